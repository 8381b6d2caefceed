"""The launcher, with small scripts for ranks: what it starts and watches, and whose end it takes for the cause."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sft_api.report import Termination, TrainerReport
from sft_api.run import ExitCode
from sft_api.status import CheckpointStatus
from sft_trainer.__main__ import account_for, finish
from sft_trainer.ending import Account, End, Outcome, cause, reason, write_account
from sft_trainer.launch import Gang, Limits, run_ranks, with_report

PATIENT = Limits(hang_seconds=600, grace_seconds=600, settle_seconds=1)


def launch(processes: int, command: list[str], work: Path, limits: Limits = PATIENT) -> Outcome:
    return run_ranks(Gang(processes, processes, 0, "127.0.0.1", 1), command, work, limits, threads=1)


def script(folder: Path, body: str) -> list[str]:
    """A rank that carries out `body`; `rank`, `at(stage)` and `say(code, message)` are there for it."""
    source = f"""
        import faulthandler, os, signal, sys, time
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        from sft_trainer.ending import Account, write_account
        from sft_trainer.hang import STACKS_SIGNAL, stacks_file
        from sft_trainer.heartbeat import Heartbeat
        from sft_trainer.parent import end_with
        end_with(int(os.environ["SFT_LAUNCHER"]))
        rank, work = int(os.environ["RANK"]), Path(os.environ["SFT_WORK"])
        stacks = stacks_file(work, rank).open("w")
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        at = Heartbeat(work, rank).beat
        def say(code, message):
            write_account(work, rank, Account(code=code, message=message))
            sys.exit(code)
    """
    path = folder / "rank.py"
    path.write_text(textwrap.dedent(source) + textwrap.dedent(body))
    return [str(path)]


def test_a_gang_s_ranks_know_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = """
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
        (work / f"saw-{rank}").write_text(" ".join(os.environ[name] for name in names))
    """
    outcome = run_ranks(Gang(2, 6, 4, "10.0.0.1", 29500), script(tmp_path, body), tmp_path, PATIENT, threads=3)
    assert outcome == Outcome(0, "completed", 4)
    assert (tmp_path / "saw-4").read_text() == "4 0 6 2 10.0.0.1 29500 3"
    assert (tmp_path / "saw-5").read_text() == "5 1 6 2 10.0.0.1 29500 3"


def test_pods_make_one_gang_of_all_their_processes() -> None:
    # As the training operator sets them for 3 pods of 8 processes: RANK counts pods and WORLD_SIZE processes.
    pod = {"WORLD_SIZE": "24", "RANK": "2", "MASTER_ADDR": "master-0", "MASTER_PORT": "23456"}
    pod |= {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8"}
    assert Gang.from_environment(8, pod) == Gang(8, 24, 16, "master-0", 23456)


def test_one_pod_needs_no_name_server_to_meet_itself() -> None:
    pod = {"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "master-0", "MASTER_PORT": "23456", "PET_NNODES": "1"}
    gang = Gang.from_environment(8, pod)
    assert (gang.world, gang.first_rank, gang.address) == (8, 0, "127.0.0.1")


def test_a_rank_that_fails_ends_the_others_and_gives_its_code_and_words(tmp_path: Path) -> None:
    body = """
        if rank == 1:
            say(11, "line 3 is broken")
        signal.pause()
    """
    outcome = launch(3, script(tmp_path, body), tmp_path)
    assert outcome == Outcome(ExitCode.DATA, "line 3 is broken", 1)


def test_a_rank_that_is_killed_is_named_with_its_signal(tmp_path: Path) -> None:
    body = """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    """
    outcome = launch(2, script(tmp_path, body), tmp_path)
    assert outcome == Outcome(137, "rank 1 was killed by SIGKILL", 1)


WAITING = """
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    at("step 7")
    (work / f"ready-{rank}").touch()
    while not told:
        signal.pause()
    say(30, "step 7 is committed")
"""


def test_ranks_that_are_told_to_stop_before_they_can_listen_have_not_failed(tmp_path: Path) -> None:
    body = """
    at("step 7")
    (work / f"ready-{rank}").touch()
    while rank == 0:
        signal.pause()  # what SIGTERM does to an interpreter that has just started
    signal.signal(signal.SIGTERM, lambda *_: os._exit(30))  # and a little later
    signal.pause()
    """
    process = start_launcher(tmp_path, body)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out == "30 told to stop before the ranks had met; run again to go on\n"


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_ranks_end_with_their_launcher_even_if_it_is_killed(tmp_path: Path, stopped: bool) -> None:
    body = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    at("step 7")
    (work / f"pid-{{rank}}").write_text(str(os.getpid()))
    (work / f"ready-{{rank}}").touch()
    if {stopped}:
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        signal.pause()
    """
    with start_launcher(tmp_path, body) as process:
        ranks = [os.pidfd_open(int((tmp_path / f"pid-{rank}").read_text())) for rank in (0, 1)]
        process.kill()
        for rank in ranks:
            assert select.select([rank], [], [], 60)[0], "it lives on without its launcher"
            os.close(rank)


def test_a_rank_whose_launcher_is_gone_when_it_starts_ends_at_once(tmp_path: Path) -> None:
    source = f"import sys; sys.path[:0] = {sys.path!r}; from sft_trainer.parent import end_with; end_with(1 << 30)"
    assert subprocess.run([sys.executable, "-c", source], check=False, timeout=60).returncode == -signal.SIGKILL


def start_launcher(folder: Path, body: str, grace_seconds: float = 600) -> subprocess.Popen[str]:
    """A process that launches two ranks and prints the outcome; returns when both are ready."""
    command = script(folder, body)
    launcher = folder / "launcher.py"
    launcher.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from sft_trainer.launch import Gang, Limits, run_ranks\n"
        f"gang, limits = Gang(2, 2, 0, '127.0.0.1', 1), Limits(600, {grace_seconds})\n"
        f"outcome = run_ranks(gang, {command!r}, Path({str(folder)!r}), limits, threads=1)\n"
        "print(outcome.code, outcome.message)\n"
    )
    process = subprocess.Popen([sys.executable, str(launcher)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((folder / f"ready-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        os.sched_yield()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_every_rank_as_sigterm(tmp_path: Path, number: signal.Signals) -> None:
    process = start_launcher(tmp_path, WAITING)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out == "30 step 7 is committed\n"


def test_the_second_stop_signal_ends_everything_at_once(tmp_path: Path) -> None:
    body = """
    def ignore(*_):
        (work / f"told-{rank}").touch()
    signal.signal(signal.SIGTERM, ignore)
    at("step 7")
    (work / f"ready-{rank}").touch()
    while True:
        signal.pause()
    """
    process = start_launcher(tmp_path, body)
    process.send_signal(signal.SIGTERM)
    while not all((tmp_path / f"told-{rank}").exists() for rank in (0, 1)):
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out == "130 stopped at once; what was committed before counts\n"


def test_ranks_that_cannot_end_in_time_are_ended_and_what_was_committed_counts(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    at("step 7")
    (work / f"ready-{rank}").touch()
    while True:
        signal.pause()
    """
    process = start_launcher(tmp_path, body, grace_seconds=1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out == "30 told to stop, and not done with saving after 1 s: what was committed before counts\n"


def test_ranks_that_wait_for_those_of_other_machines_are_ended_at_once(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (work / f"ready-{rank}").touch()
    while True:
        signal.pause()
    """
    process = start_launcher(tmp_path, body)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out == "30 told to stop before the ranks had met; run again to go on\n"


def test_ranks_that_were_told_elsewhere_to_stop_may_take_their_time_to_save(tmp_path: Path) -> None:
    body = """
        if rank == 0:
            while not (work / "account-1.json").exists():
                os.sched_yield()
            time.sleep(2)  # longer than the launcher lets ranks live after a failure
        say(30, "step 7 is committed")
    """
    assert launch(2, script(tmp_path, body), tmp_path) == Outcome(30, "step 7 is committed", 0)


def test_a_gang_that_comes_to_no_end_shows_its_stacks_and_the_rank_that_was_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
        import threading
        def all_reduce():
            at("step 17 (phase one)")
            if rank == 1:
                stop()
            if rank == 2:
                spin()
            signal.pause()
        def stop():
            os.kill(os.getpid(), signal.SIGSTOP)
        def spin():
            while True:
                pass
        def upload():
            threading.Event().wait()
        threading.Thread(target=upload, daemon=True).start()
        at("step 16 (phase one)", 600)  # until all are there
        (work / f"here-{rank}").touch()
        while not all((work / f"here-{other}").exists() for other in range(3)):
            os.sched_yield()
        all_reduce()
    """
    outcome = launch(3, script(tmp_path, body), tmp_path, Limits(2, 600, stacks_seconds=1))
    assert (outcome.code, outcome.rank) == (ExitCode.HUNG, 1)
    said = "step 17 (phase one) has not ended within 2 s on rank 1; its process is stopped (SIGSTOP). The stacks of"
    assert outcome.message.startswith(said)
    _, *told = capfd.readouterr().err.split("── rank ")
    for rank, (stacks, inside) in enumerate(zip(told, ("all_reduce", "stop", "spin"), strict=True)):
        assert stacks.startswith(f"{rank} (process ")
        assert ", at step 17 (phase one) for " in stacks
        assert f"in {inside}" in stacks
        assert "in upload" in stacks  # another thread of it


def test_a_process_that_is_stopped_has_no_patience(tmp_path: Path) -> None:
    body = """
        at("waiting for a commit", 600)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        signal.pause()
    """
    outcome = launch(2, script(tmp_path, body), tmp_path, Limits(1, 600, stacks_seconds=1))
    assert (outcome.code, outcome.rank) == (ExitCode.HUNG, 1)
    assert outcome.message.startswith("waiting for a commit has not ended within 1 s on rank 1; its process is stopped")


def test_what_has_a_patience_of_its_own_is_no_hang_before_that(tmp_path: Path) -> None:
    body = """
        at("waiting for a commit", 600)
        time.sleep(2)
        say(0, "done")
    """
    assert launch(1, script(tmp_path, body), tmp_path, Limits(1, 600)) == Outcome(0, "done", 0)


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_every_exit_code_of_a_rank_is_the_launcher_s_with_its_termination_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: ExitCode
) -> None:
    log = tmp_path / "termination-log"
    log.touch()  # as a kubelet does
    monkeypatch.setenv("SFT_TERMINATION_LOG", str(log))
    command = script(tmp_path, f"say({code.value} if rank == 1 else 0, 'as it was')")
    outcome = account_for(lambda: launch(2, command, tmp_path))
    finish(outcome)
    assert outcome.code == code
    said = Termination.model_validate_json(log.read_text())
    failed = code != ExitCode.COMPLETED
    assert (said.exit_code, said.reason, said.message) == (code, reason(code), "as it was")
    assert said.rank == (1 if failed else 0)


def test_an_outcome_takes_from_the_report_what_a_dead_rank_cannot_say() -> None:
    checkpoint = CheckpointStatus.model_validate(
        {
            "uri": "file:///x/ckpt/00000004/1",
            "step": 4,
            "phase": "one",
            "time": "2026-01-01T00:00:00Z",
            "verified": True,
        }
    )
    report = TrainerReport(attempt=1, checkpoint=checkpoint)
    outcome = with_report(Outcome(137, "rank 1 was killed by SIGKILL", 1), report)
    assert outcome == Outcome(137, "rank 1 was killed by SIGKILL", 1, None, 4, report)


def end(code: int, account: int | None = None, killed_by_us: bool = False) -> End:
    said = Account(code=account, message=f"said {account}") if account is not None else None
    return End(code, killed_by_us, said)


KILLED = -signal.SIGKILL
CAUSES = {
    "a full bucket before the peers it left": ([end(32, 32), end(13, 13)], (13, 1)),
    "an unknown error before complaints": ([end(32, 32), end(1)], (1, 1)),
    "a rank killed by the kernel before complaints": ([end(32, 32), end(KILLED)], (137, 1)),
    "a complaint before those we killed": ([end(KILLED, killed_by_us=True), end(32, 32)], (32, 1)),
    "a crash before those we killed": ([end(KILLED, killed_by_us=True), end(-signal.SIGSEGV)], (139, 1)),
    "a failure before those that could still commit": ([end(30, 30), end(14, 14)], (14, 1)),
    "preempted when all were": ([end(30, 30), end(30, 30)], (30, 0)),
    "completed when all were": ([end(0, 0), end(0, 0)], (0, 0)),
    "any failure before those that completed": ([end(0, 0), end(32, 32)], (32, 1)),
}


@pytest.mark.parametrize(("ends", "expected"), CAUSES.values(), ids=CAUSES.keys())
def test_the_cause_is(ends: list[End], expected: tuple[int, int]) -> None:
    outcome = cause(ends, first_rank=0)
    assert (outcome.code, outcome.rank) == expected


def test_an_account_is_whole_or_not_there(tmp_path: Path) -> None:
    write_account(tmp_path, 3, Account(code=14, message="out of memory", step=9, checkpoint_step=5))
    assert [path.name for path in tmp_path.iterdir()] == ["account-3.json"]
