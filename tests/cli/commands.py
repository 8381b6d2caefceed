"""Runs `sft` as a person does: in a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sft_api.events import Event

ROOT = Path(__file__).parents[2]
SFT = Path(sys.executable).with_name("sft")
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")

MANIFEST = """\
apiVersion: sftjob.dev/v1alpha1
kind: SFTJob
metadata: {name: small}
spec:
  model: {uri: "file://model"}
  recipe: TULU
  strategy: Phased
  phases:
  - {name: instruct, data: [{uri: "file://data/a.jsonl"}]}
  - {name: skills, data: [{uri: "file://data/b.jsonl"}]}
  trainer: {gpusPerNode: 0}
  checkpoints: {uri: "file://runs/job"}
"""


def sft(*arguments: str, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SFT), *arguments], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )


def manifest(folder: Path, text: str = MANIFEST, name: str = "job.yaml") -> str:
    (folder / name).write_text(text)
    return name


def play(folder: Path, prepare: Iterable[object], train: Iterable[object]) -> Path:
    """The script that the fake trainer is to follow: events, and instructions as dictionaries."""
    script = folder / "script"
    script.mkdir()
    for stage, lines in (("prepare", prepare), ("train", train)):
        (script / f"{stage}.jsonl").write_text("".join(f"{as_line(line)}\n" for line in lines))
    return script


def as_line(value: object) -> str:
    return value.model_dump_json(by_alias=True) if hasattr(value, "model_dump_json") else json.dumps(value)


def run_command(
    script: Path, *, processes: int | None = None, overrides: Sequence[str] = (), as_json: bool = False
) -> list[str]:
    """`sft run job.yaml` with the fake trainer in the trainer's place."""
    trainer = [sys.executable, str(FAKE_TRAINER), str(script)]
    call = f"run('job.yaml', {processes!r}, {list(overrides)!r}, {as_json!r}, trainer_command={trainer!r})"
    return [sys.executable, "-c", f"import sys; from sft_cli.run import run; sys.exit({call})"]


def keep_events(folder: Path, attempt: int, events: Iterable[Event]) -> None:
    """Leave the steps of an attempt in the store at `folder`, where a trainer leaves them, and what else it said."""
    from sft_api import names

    lines = list(events)
    for key, chosen in (
        (names.metrics(attempt), [event for event in lines if event.event == "step"]),
        (names.events(attempt), [event for event in lines if event.event != "step"]),
    ):
        if chosen:
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{as_line(event)}\n" for event in chosen))
