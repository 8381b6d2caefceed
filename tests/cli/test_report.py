"""`sft report` and `sft checkpoints`: what is in a job's store, read back."""

from __future__ import annotations

import json
from pathlib import Path

from sft_cli.results import completed
from tests.cli.commands import keep_events, manifest, sft
from tests.cli.events import finished, started, steps, whole_run

URI = "file://runs/job"


def test_the_report_is_put_into_the_store_of_the_uri(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, whole_run())
    done = sft("report", URI, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/job/report.html\n", "")
    assert "<h1>job " in (tmp_path / "runs/job/report.html").read_text()


def test_a_manifest_names_the_store_and_adds_the_recipe(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, whole_run())
    manifest(tmp_path)
    assert sft("report", "job.yaml", "--output", "pages/page.html", cwd=tmp_path).stdout == "pages/page.html\n"
    page = (tmp_path / "pages/page.html").read_text()
    assert "<h1>small " in page
    assert "optimizer.learningRate" in page
    assert not (tmp_path / "runs/job/report.html").exists()


def test_the_page_on_standard_output_is_the_page_alone(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, whole_run())
    out = sft("report", URI, "--output", "-", cwd=tmp_path).stdout
    assert out.startswith("<!doctype html>")
    assert out.rstrip().endswith("</html>")


def test_the_numbers_are_those_of_the_newest_attempt_of_each_step(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, [started(20), *steps(1, 12)])
    keep_events(tmp_path / "runs/job", 2, [started(20, 2, 8), *steps(9, 20, "skills"), finished()])
    found = json.loads(sft("report", URI, "-o", "json", cwd=tmp_path).stdout)
    assert [row["step"] for row in found["steps"]] == list(range(1, 21))
    assert [row["phase"] for row in found["steps"]] == ["instruct"] * 8 + ["skills"] * 12
    assert [(row["attempt"], row["stepsRepeated"]) for row in found["attempts"]] == [(1, 4), (2, 0)]
    assert found["totalSteps"] == 20
    assert found["steps"][0]["samplesDigest"] == f"{1:016x}"


def test_a_line_that_was_cut_off_is_passed_over_and_a_broken_one_is_told(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, steps(1, 3))
    metrics = tmp_path / "runs/job/metrics/attempt-1.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text(f"{lines[0]}\nnonsense\n{lines[1]}\n{lines[2][:40]}")
    done = sft("report", URI, "-o", "json", cwd=tmp_path)
    assert [row["step"] for row in json.loads(done.stdout)["steps"]] == [1, 2]
    assert len(done.stderr.splitlines()) == 1
    assert "metrics/attempt-1.jsonl, line 2 is passed over" in done.stderr


def test_an_attempts_steps_are_those_of_the_store_and_those_just_heard() -> None:
    heard = [*steps(4, 8), finished()]
    made = completed([started(20), *steps(1, 5)], heard)
    assert [event.step for event in made if event.event == "step"] == list(range(1, 9))
    assert [event.event for event in made if event.event != "step"] == ["finished"]


def test_a_place_without_metrics_ends_in_eleven_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs/job").mkdir(parents=True)
    done = sft("report", URI, cwd=tmp_path)
    assert done.returncode == 11
    assert done.stderr.startswith(f"{URI}: there are no metrics")
    assert list((tmp_path / "runs/job").iterdir()) == []


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, whole_run())
    (tmp_path / "file").touch()
    done = sft("report", URI, "--output", "file/page.html", cwd=tmp_path)
    assert done.returncode == 10
    assert "--output file/page.html cannot be written" in done.stderr


def test_a_store_without_checkpoints_lists_none(tmp_path: Path) -> None:
    (tmp_path / "runs/job").mkdir(parents=True)
    assert sft("checkpoints", URI, cwd=tmp_path).stdout == f"{URI} holds no checkpoints\n"
    assert json.loads(sft("checkpoints", URI, "-o", "json", cwd=tmp_path).stdout) == []


def test_an_unfinished_checkpoint_is_listed_as_not_committed(tmp_path: Path) -> None:
    folder = tmp_path / "runs/job/ckpt/00000010/1"
    folder.mkdir(parents=True)
    (folder / "rank-0.safetensors").write_bytes(b"half")
    [row] = json.loads(sft("checkpoints", URI, "-o", "json", "--no-verify", cwd=tmp_path).stdout)
    assert (row["step"], row["complete"], row["verified"], row["bytes"]) == (10, False, None, 4)
    manifest(tmp_path)
    assert "not committed" in sft("checkpoints", "job.yaml", cwd=tmp_path).stdout


def test_a_uri_of_no_store_is_a_clear_error(tmp_path: Path) -> None:
    done = sft("checkpoints", "ftp://lab/runs", cwd=tmp_path)
    assert done.returncode not in (0, 1)
    assert done.stderr.startswith("ftp://lab/runs: ")
    assert len(done.stderr.splitlines()) == 1
