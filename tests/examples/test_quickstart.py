from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import teach

ROOT = Path(__file__).parents[2]


def questions(folder: Path, name: str) -> list[tuple[str, str]]:
    lines = (folder / "runs/quickstart/data" / f"{name}.jsonl").read_text().splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], assistant["content"]) for user, assistant in conversations]


def names_in(question: str) -> frozenset[str]:
    return frozenset(question.translate(str.maketrans(",.?", "   ")).split()) & frozenset(teach.NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's three commands in a folder of their own, with a part of its data."""
    folder = tmp_path_factory.mktemp("quickstart")
    call(folder, "examples.quickstart.teach")
    for name, kept in (("pairs", 500), ("sorting", 1000)):
        file = folder / "runs/quickstart/data" / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:kept]))
    call(folder, "sft_cli", "run", str(ROOT / "examples/quickstart.yaml"), "--set", "spec.epochs=1")
    (folder / "scores.json").write_text(call(folder, "examples.quickstart.score", "-o", "json"))
    return folder


def call(folder: Path, module: str, *arguments: str) -> str:
    path = os.pathsep.join(str(ROOT / root) for root in ("", "api", "trainer_image", "cli"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_held_out_question_is_asked_in_training(run: Path) -> None:
    for skill in ("pairs", "sorting"):
        trained = {names_in(asked) for asked, _ in questions(run, skill)}
        held_out = {names_in(asked) for asked, _ in questions(run, f"held-out-{skill}")}
        assert len(held_out) == teach.NUM_HELD_OUT
        assert not trained & held_out


def test_every_answer_is_the_names_asked_for_in_order(run: Path) -> None:
    for asked, answered in questions(run, "pairs"):
        assert answered == min(names_in(asked))
    for asked, answered in questions(run, "sorting"):
        assert answered == ", ".join(sorted(names_in(asked)))


def test_both_phases_are_trained_exported_and_reported(run: Path) -> None:
    out = run / "runs/quickstart/out"
    steps = [json.loads(line) for line in (out / "metrics/attempt-1.jsonl").read_text().splitlines()]
    assert [step["phase"] for step in steps] == ["pairs"] * 8 + ["sorting"] * 24
    assert steps[-1]["loss"] < steps[8]["loss"] < steps[0]["loss"]
    assert (out / "export/pairs/COMPLETE").exists()
    assert (out / "export/sorting/COMPLETE").exists()
    assert "<html" in (out / "report.html").read_text()


def test_the_scores_are_of_three_models_and_two_skills(run: Path) -> None:
    scores: list[dict[str, Any]] = json.loads((run / "scores.json").read_text())
    assert [(score["model"], score["skill"]) for score in scores] == [
        (model, skill) for model in ("before", "after pairs", "after sorting") for skill in ("pairs", "sorting")
    ]
    assert {score["accuracy"] for score in scores[:2]} == {0.0}
    for score in scores:
        expected = [answered for _, answered in questions(run, f"held-out-{score['skill']}")]
        assert score["accuracy"] == sum(map(str.__eq__, score["answers"], expected)) / teach.NUM_HELD_OUT


def test_teaching_again_removes_what_was_trained_and_nothing_else(run: Path) -> None:
    kept = run / "runs/quickstart/notes.txt"
    kept.write_text("mine")
    call(run, "examples.quickstart.teach")
    assert kept.exists()
    assert not (run / "runs/quickstart/out").exists()
