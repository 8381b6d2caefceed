"""`sft run` against a trainer that says what it is told to say: what is shown, what is passed on, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from sft_api.events import EVENT, Message
from sft_api.run import RunConfig
from tests.cli.commands import MANIFEST, keep_events, manifest, play, run_command, sft
from tests.cli.events import checkpoint, finished, prepared, started, step, steps, whole_run

READY = [prepared(), prepared("skills", dropped={}, truncated=0), finished(message="800 samples are ready")]
DEADLINE_SECONDS = 60


def run(folder: Path, train: Sequence[object], prepare: Sequence[object] = READY, **how: object) -> Done:
    manifest(folder)
    command = run_command(play(folder, prepare, train), **how)  # type: ignore[arg-type]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)


Done = subprocess.CompletedProcess[str]


def start(folder: Path, train: Sequence[object], prepare: Sequence[object] = READY) -> subprocess.Popen[str]:
    """A run whose trainer waits for SIGTERM; returns when it does wait."""
    manifest(folder)
    command = run_command(play(folder, prepare, train))
    running = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    read_until("the fake trainer waits", running)
    return running


def read_until(text: str, running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None
    for line in running.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said")


def test_a_run_ends_in_zero_with_a_summary_of_what_became_better(tmp_path: Path) -> None:
    done = run(tmp_path, whole_run())
    assert (done.returncode, done.stderr) == (0, "")
    summary = done.stdout.partition("✓ Trained.")[2]
    said = dict(line.split("  ", 1) for line in summary.strip().splitlines())
    assert {label: value.strip() for label, value in said.items() if label not in ("time",)} == {
        "loss": "2.81 → 1.271",
        "held-out loss": "3.1 → 1.3",
        "held-out accuracy": "18.0% → 74.0%",
        "steps": "20 of 20",
        "trained on": "160 samples, 16k tokens, 6,000 with loss",
        "throughput": "1,600 tokens/s, no padding counted",
        "packing": "97.0% of what the ranks wait for; 99.0% is the best any plan could reach",
        "checkpoint": "step 20, 123.5 MB (the newest of 2 committed): sft checkpoints file://runs/job",
        "model": "runs/job/export/skills (after skills)",
        "report": "runs/job/report.html",
    }
    assert "<h1>small" in (tmp_path / "runs/job/report.html").read_text()


def test_plain_lines_tell_the_data_the_samples_and_every_notable_event(tmp_path: Path) -> None:
    lines = run(
        tmp_path, [Message(level="warning", text="a \x1b[31mred\x1b[0m word"), *whole_run()]
    ).stdout.splitlines()
    assert any("12 dropped: NoLossTokens" in line and "4 truncated" in line for line in lines)
    assert "    ⟦17 + 25 = 42.<|im_end|>⟧" in lines
    assert lines.count("    ⟦17 + 25 = 42.<|im_end|>⟧") == 3
    assert any(line.startswith("step 10 · checkpoint committed") for line in lines)
    assert any(line.startswith("step 1/20 · instruct epoch 1 · loss 2.81") for line in lines)
    assert any(line.startswith("step 20/20 · skills epoch 1") for line in lines)
    assert "warning: a ␛[31mred␛[0m word" in lines


def test_steps_that_come_quickly_are_told_once_every_few_seconds(tmp_path: Path) -> None:
    lines = run(tmp_path, [started(2000), *steps(1, 2000), finished()]).stdout.splitlines()
    told = [line for line in lines if line.startswith("step ")]
    assert 2 <= len(told) < 20


def test_json_hands_on_the_events_as_they_are_and_nothing_else(tmp_path: Path) -> None:
    done = run(tmp_path, [{"do": "print", "text": "a library's chatter"}, *whole_run()], as_json=True)
    assert done.returncode == 0
    expected = [*READY, *whole_run()]
    assert [EVENT.validate_json(line) for line in done.stdout.splitlines()] == expected
    assert done.stdout == "".join(f"{event.model_dump_json(by_alias=True)}\n" for event in expected)
    assert (tmp_path / "runs/job/report.html").exists()


def test_the_trainer_is_told_the_resolved_job_and_the_processes(tmp_path: Path) -> None:
    run(tmp_path, whole_run(), processes=3, overrides=["spec.epochs=7", "spec.optimizer.learningRate=1e-4"])
    config = RunConfig.model_validate_json((tmp_path / "script/train.run.json").read_text())
    assert [phase.epochs for phase in config.phases] == [7, 7]
    assert config.phases[0].optimizer.learning_rate == 1e-4
    [path, *arguments] = json.loads((tmp_path / "script/train.arguments").read_text())
    assert arguments == ["--processes", "3"]
    assert not Path(path).parent.exists()
    assert json.loads((tmp_path / "script/prepare.arguments").read_text()) == [path]


def test_a_failed_preparation_ends_the_run_with_its_code_and_message(tmp_path: Path) -> None:
    message = "spec.phases[0].data[0].uri: line 7 of a.jsonl is no JSON"
    done = run(tmp_path, whole_run(), [{"do": "say", "text": "a stack"}, finished(11, "Data", message)])
    assert done.returncode == 11
    assert f"✗ Ended with exit code 11: {message}" in done.stdout
    assert "  a stack" in done.stdout.splitlines()
    assert not (tmp_path / "script/train.arguments").exists()


def test_a_failed_training_shows_the_end_of_its_log_and_how_to_go_on(tmp_path: Path) -> None:
    train = [
        started(20),
        *steps(1, 12),
        checkpoint(10),
        *({"do": "say", "text": f"line {number}"} for number in range(30)),
        finished(32, "Communication", "rank 1 went away", step=12, checkpoint_step=10),
    ]
    done = run(tmp_path, train)
    assert done.returncode == 32
    lines = done.stdout.splitlines()
    assert "✗ Ended with exit code 32: rank 1 went away" in lines
    assert [line for line in lines if line.startswith("  line ")] == [f"  line {number}" for number in range(15, 30)]
    assert lines[-1] == "Run the same command again: it goes on after step 10."
    log = Path(next(line for line in lines if line.startswith("The last lines")).split("log, ")[1].rstrip(":"))
    assert log.read_text().startswith("line 0\n")
    assert "Communication" in (tmp_path / "runs/job/report.html").read_text()


def test_a_trainer_that_is_killed_is_told_as_such(tmp_path: Path) -> None:
    done = run(tmp_path, [started(20), step(1), {"do": "print", "text": "a library's chatter"}, {"do": "kill"}])
    assert done.returncode == 128 + signal.SIGKILL
    assert "  a library's chatter" in done.stdout.splitlines()
    assert "✗ Ended with exit code 137: the trainer was ended by SIGKILL" in done.stdout


def test_a_later_attempt_is_reported_together_with_the_earlier_ones(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, [started(20), *steps(1, 8)])
    done = run(tmp_path, [started(20, attempt=2, resumed_from_step=5), *steps(6, 20), finished()])
    assert "steps               20 of 20, 3 taken again after restarts" in done.stdout.splitlines()
    assert "loss                2.81 → 1.271" in done.stdout.splitlines()


def test_a_job_that_is_done_already_is_summed_up_once_more(tmp_path: Path) -> None:
    keep_events(tmp_path / "runs/job", 1, whole_run())
    done = run(tmp_path, [started(20, attempt=2, resumed_from_step=20), finished()])
    assert done.returncode == 0
    assert "held-out accuracy   18.0% → 74.0%" in done.stdout.splitlines()


def test_a_report_that_cannot_be_written_does_not_change_how_the_run_ended(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/job").write_text("a file where the store's folder should be")
    done = run(tmp_path, whole_run())
    assert done.returncode == 0
    assert done.stderr.startswith("The report could not be written: ")
    assert "loss                2.81 → 1.271" in done.stdout.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_stop_signal_lets_the_trainer_commit_a_checkpoint(number: int, tmp_path: Path) -> None:
    last_words = finished(30, "Preempted", "stopped after step 3", step=3, checkpoint_step=3)
    running = start(tmp_path, [started(20), *steps(1, 3), {"do": "wait"}, checkpoint(3), last_words])
    running.send_signal(number)
    out, errors = running.communicate(timeout=DEADLINE_SECONDS)
    assert (running.returncode, errors) == (30, "")
    assert "Stopping: the trainer commits a checkpoint first." in out
    assert "■ Stopped: stopped after step 3" in out
    assert out.splitlines()[-1] == "Run the same command again: it goes on after step 3."


def test_the_second_stop_signal_kills_the_trainer_and_its_ranks_at_once(tmp_path: Path) -> None:
    train = [started(20), *steps(1, 3), {"do": "deafen"}, {"do": "child"}, {"do": "wait"}]
    running = start(tmp_path, train)
    rank = psutil.Process(int((tmp_path / "script/child").read_text()))
    running.send_signal(signal.SIGINT)
    read_until("Stopping: ", running)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=DEADLINE_SECONDS)
    assert running.returncode == 128 + signal.SIGKILL
    assert "Stopped at once." in out
    psutil.wait_procs([rank], timeout=DEADLINE_SECONDS)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_the_terminals_own_signal_does_not_reach_the_trainer(tmp_path: Path) -> None:
    last_words = finished(30, "Preempted", "stopped", step=3)
    running = start(tmp_path, [started(20), {"do": "wait"}, last_words])
    [trainer] = psutil.Process(running.pid).children()
    assert os.getsid(trainer.pid) == trainer.pid
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=DEADLINE_SECONDS)
    assert running.returncode == 30


def test_a_stop_while_the_data_is_prepared_trains_nothing(tmp_path: Path) -> None:
    running = start(tmp_path, whole_run(), [{"do": "wait"}, *READY])
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=DEADLINE_SECONDS)
    assert running.returncode == 30
    assert "■ Stopped: nothing was trained yet" in out
    assert not (tmp_path / "script/train.arguments").exists()


def test_a_manifest_with_problems_ends_in_ten_with_one_problem_a_line(tmp_path: Path) -> None:
    manifest(tmp_path, MANIFEST.replace("recipe: TULU", "recipe: TULIP").replace("gpusPerNode: 0", "gpus: 0"))
    done = sft("run", "job.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [
        ["job.yaml", "spec.recipe"],
        ["job.yaml", "spec.trainer.gpus"],
    ]


def test_an_override_that_leads_nowhere_ends_in_ten(tmp_path: Path) -> None:
    manifest(tmp_path)
    done = sft("run", "job.yaml", "--set", "spec.phases[9].name=x", cwd=tmp_path)
    assert done.returncode == 10
    assert done.stderr.startswith("--set: spec.phases[9]: the list has 2 elements")


def test_gpus_that_this_machine_lacks_are_told_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, whole_run(), overrides=["spec.trainer.gpusPerNode=16", "spec.trainer.nodes=500"])
    assert done.stdout.splitlines()[0].startswith("The manifest asks for 500 nodes with 16 GPUs each; ")


def test_variables_of_the_manifest_are_set_for_the_trainer_and_pods_fields_are_named(tmp_path: Path) -> None:
    extra = ["spec.trainer.env[0]={name: SEEN, value: of the manifest}", "spec.trainer.image=registry/trainer"]
    done = run(tmp_path, [{"do": "tell", "variable": "SEEN"}, *whole_run()], overrides=extra)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "Only a cluster obeys spec.trainer.image; here it changes nothing."
    assert (tmp_path / "script/train.SEEN").read_text() == "of the manifest"
