"""The trainer's commands as pods run them: real processes, two launchers for two pods, and what stops them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_api.report import Termination
from sft_api.run import ExitCode, RunConfig
from sft_trainer.__main__ import parser, prepare
from sft_trainer.checkpoint import list_checkpoints
from sft_trainer.launch import free_port
from sft_trainer.preparation import prepared_job
from sft_trainer.schedule import Schedule
from sft_trainer.split import open_data
from sft_trainer.store import Store
from tests.gang import Gangs
from tests.trainer.runs import Script, attempt, make_base, make_run, read_run, write_conversations

PODS = 2
SECONDS = 300
"""Before a test that hangs is given up."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def write(folder: Path, config: RunConfig) -> Path:
    path = folder / "run.json"
    path.write_text(config.model_dump_json(by_alias=True))
    return path


def test_preparation_tells_the_plan_whether_it_had_anything_to_do_or_not(base: Path, tmp_path: Path) -> None:
    config = make_run(base, f"file://{tmp_path}/out", {"batch": {"maxSequenceLength": 60}})
    options = parser().parse_args(["prepare", str(write(tmp_path, config)), "--processes", "1"])
    again = prepare(options, config)
    new = prepare(options, config.model_copy(update={"prepared_data_uri": f"file://{tmp_path}/elsewhere"}))
    assert again == new
    plan = new.plan
    assert plan is not None
    data, _ = open_data(config, prepared_job(config))
    schedule = Schedule(config.phases, [len(phase.samples) for phase in data])
    assert [(phase.name, phase.samples, phase.steps, phase.dropped) for phase in plan.phases] == [
        (phase.name, phase.num_samples, phase.total_steps, 0) for phase in schedule.phases
    ]
    assert plan.samples == sum(phase.samples for phase in plan.phases)
    assert plan.tokens == sum(phase.tokens for phase in plan.phases) > plan.samples
    assert all(phase.truncated > 0 and len(phase.fingerprint) == 32 for phase in plan.phases)


def test_a_stop_ends_a_preparation_that_waits_for_its_store(base: Path, tmp_path: Path) -> None:
    config = make_run(base, f"file://{tmp_path}/out")
    asked = config.checkpoints.model_copy(update={"uri": "s3://bucket/run"})
    config = config.model_copy(update={"checkpoints": asked})
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{deaf.getsockname()[1]}"}
        command = [sys.executable, "-m", "sft_trainer", "prepare", str(write(tmp_path, config))]
        with subprocess.Popen(command, env=os.environ | keys | endpoint, stdout=subprocess.PIPE, text=True) as process:
            deaf.settimeout(SECONDS)
            connection, _ = deaf.accept()  # it has asked, and nobody answers
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
            connection.close()
    assert process.returncode == ExitCode.PREEMPTED
    said = "told to stop before the training began; run again to go on"
    assert out == f"Preempted (exit code 30): {said}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_preparation_that_is_ended_leaves_no_process_and_no_data_that_looks_whole(
    base: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = make_run(base, f"file://{tmp_path}/out")
    texts = write_conversations(tmp_path / "many.jsonl", 20_000, 1)
    many = config.phases[0].data[0].model_copy(update={"uri": f"file://{texts}"})
    config.phases[0].data[0] = many
    config = config.model_copy(update={"prepared_data_uri": f"file://{tmp_path}/elsewhere"})
    command = [sys.executable, "-m", "sft_trainer", "prepare", str(write(tmp_path, config)), "--processes", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        await_line(process, "preparing one: ")
        started = [os.pidfd_open(pid) for pid in descendants(process.pid)]
        process.send_signal(number)
        process.wait(SECONDS)
        for pid in started:
            assert select.select([pid], [], [], 60)[0], "a process lives on"
            os.close(pid)
    assert process.returncode == (ExitCode.PREEMPTED if number == signal.SIGTERM else -number)
    assert len(started) > 2
    assert not list((tmp_path / "elsewhere").rglob("COMPLETE"))


def test_a_command_that_is_told_to_stop_while_it_imports_has_heard_it() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sft_trainer", "prepare", "no-such-run.json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.split("|")[-1].strip() == "sft_api.base":
                process.send_signal(signal.SIGTERM)
    assert process.returncode == ExitCode.PREEMPTED


@contextmanager
def pods(run: Path, log: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """A launcher for each pod, of one rank each, with the environment that the training operator gives them."""
    port, started = str(free_port()), []
    for index in range(PODS):
        told = {"PET_NNODES": str(PODS), "PET_NODE_RANK": str(index), "WORLD_SIZE": str(PODS), "RANK": str(index)}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "sft_trainer", "train", str(run), "--processes", "1"]
        with (log.with_suffix(f".{index}")).open("w") as errors:
            pod = subprocess.Popen(command, env=os.environ | told, stdout=subprocess.PIPE, stderr=errors, text=True)
        started.append(pod)
    try:
        yield started
    finally:
        for pod in started:
            pod.kill()
            pod.communicate()


def await_line(pod: subprocess.Popen[str], beginning: str) -> None:
    assert pod.stdout is not None
    heard = []
    for line in pod.stdout:
        heard.append(line)
        if line.startswith(beginning):
            return
    pytest.fail(f"the pod never said {beginning!r}: {''.join(heard)}")


def ends(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and last line of each pod."""
    said = [pod.communicate(timeout=SECONDS)[0] for pod in started]
    return [(pod.returncode, out.splitlines()[-1]) for pod, out in zip(started, said, strict=True)]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from descendants(child)


def test_pods_that_are_stopped_and_killed_end_with_the_parameters_of_one_machine(
    gang: Gangs, base: Path, tmp_path: Path
) -> None:
    uri = f"file://{tmp_path}/out"
    config = make_run(base, uri, {"epochs": 12})
    run = write(tmp_path, config)

    with pods(run, tmp_path / "stopped") as stopped:
        await_line(stopped[0], "step 5 ")
        stopped[1].send_signal(signal.SIGTERM)
        (code, message), (other_code, other_message) = ends(stopped)
    assert (code, other_code) == (ExitCode.PREEMPTED, ExitCode.PREEMPTED)
    assert message == other_message
    committed = max(read_run(uri).digests)
    assert message == f"Preempted (exit code 30): told to stop: step {committed} is committed; run again to go on"

    with pods(run, tmp_path / "killed") as killed:
        await_line(killed[0], f"step {committed + 5} ")
        os.kill(children(killed[1].pid)[0], signal.SIGKILL)
        (code, message), (other_code, other_message) = ends(killed)
    assert code == ExitCode.COMMUNICATION
    assert message.startswith("Communication (exit code 32): the ranks lost each other: ")
    assert (other_code, other_message) == (137, "Failed (exit code 137): rank 1 was killed by SIGKILL")

    with pods(run, tmp_path / "last") as last:
        assert [code for code, _ in ends(last)] == [ExitCode.COMPLETED, ExitCode.COMPLETED]

    elsewhere = make_run(base, f"file://{tmp_path}/elsewhere", {"epochs": 12})
    gang(PODS).run(attempt, elsewhere.model_dump_json(by_alias=True), 1, str(tmp_path / "work"), Script())
    whole, pieced = (list_checkpoints(Store.open(there), verify=True)[-1] for there in (elsewhere.checkpoints.uri, uri))
    assert pieced.attempt == 3
    assert (pieced.step, pieced.parameters_digest) == (whole.step, whole.parameters_digest)
    assert pieced.verified


def test_a_rank_that_is_stopped_is_found_out_and_ranks_end_with_a_killed_launcher(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setenv("SFT_TERMINATION_LOG", str(log))
    uri = f"file://{tmp_path}/out"
    config = make_run(base, uri, {"epochs": 12, "lifecycle": {"hangTimeoutSeconds": 10}})
    command = [sys.executable, "-m", "sft_trainer", "train", str(write(tmp_path, config)), "--processes", "2"]

    errors = tmp_path / "errors"
    with (
        errors.open("w") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True) as hung,
    ):
        await_line(hung, "step 4 ")
        os.kill(children(hung.pid)[1], signal.SIGSTOP)
        ends([hung])
    assert hung.returncode == ExitCode.HUNG
    said = Termination.model_validate_json(log.read_text())
    assert (said.exit_code, said.reason, said.rank) == (ExitCode.HUNG, "Hung", 1)
    assert "has not ended within 10 s on rank 1; its process is stopped (SIGSTOP)" in said.message
    _, *stacks = errors.read_text().split("── rank ")
    assert [told[0] for told in stacks] == ["0", "1"]
    assert all("in train\n" in told and "/sft_trainer/train.py" in told for told in stacks)

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as orphaning:
        await_line(orphaning, "attempt 2: ")
        ranks = [os.pidfd_open(pid) for pid in children(orphaning.pid)]
        orphaning.kill()
        for rank in ranks:
            assert select.select([rank], [], [], 60)[0], "a rank lives on without its launcher"
            os.close(rank)
    assert len(ranks) == 2
    assert list_checkpoints(Store.open(uri), verify=True)[-1].verified
