"""The launcher, with small scripts for ranks: what it starts and passes on, and whose end it takes for the cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sft_api.run import ExitCode
from sft_trainer.launch import Account, End, Gang, Outcome, cause, run_ranks, write_account


def gang(processes: int) -> Gang:
    return Gang(processes, processes, 0, "127.0.0.1", 1)


def script(folder: Path, body: str) -> list[str]:
    """A rank that carries out `body`; `rank`, `say(code, message)` and `others_are_ready()` are there for it."""
    source = f"""
        import os, signal, sys, time
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        from sft_trainer.launch import Account, write_account
        rank, work = int(os.environ["RANK"]), Path(os.environ["SFT_WORK"])
        def say(code, message):
            write_account(work, rank, Account(code=code, message=message))
            sys.exit(code)
    """
    path = folder / "rank.py"
    path.write_text(textwrap.dedent(source) + textwrap.dedent(body))
    return [str(path)]


def test_a_gang_s_ranks_know_their_places(tmp_path: Path) -> None:
    body = """
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
        (work / f"saw-{rank}").write_text(" ".join(os.environ[name] for name in names))
    """
    outcome = run_ranks(Gang(2, 6, 4, "10.0.0.1", 29500), script(tmp_path, body), tmp_path)
    assert outcome == Outcome(0, "completed", 4)
    assert (tmp_path / "saw-4").read_text() == "4 0 6 2 10.0.0.1 29500"
    assert (tmp_path / "saw-5").read_text() == "5 1 6 2 10.0.0.1 29500"


def test_pods_make_one_gang_of_all_their_processes() -> None:
    pod = {"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "master-0", "MASTER_PORT": "23456"}
    assert Gang.from_environment(8, pod) == Gang(8, 24, 16, "master-0", 23456)


def test_a_rank_that_fails_ends_the_others_and_gives_its_code_and_words(tmp_path: Path) -> None:
    body = """
        if rank == 1:
            say(11, "line 3 is broken")
        signal.pause()
    """
    outcome = run_ranks(gang(3), script(tmp_path, body), tmp_path)
    assert outcome == Outcome(ExitCode.DATA, "line 3 is broken", 1)


def test_a_rank_that_is_killed_is_named_with_its_signal(tmp_path: Path) -> None:
    body = """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    """
    outcome = run_ranks(gang(2), script(tmp_path, body), tmp_path)
    assert outcome == Outcome(137, "rank 1 was killed by SIGKILL", 1)


WAITING = """
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    (work / f"ready-{rank}").touch()
    while not told:
        signal.pause()
    say(30, "step 7 is committed")
"""


def start_launcher(folder: Path, body: str) -> subprocess.Popen[str]:
    """A process that launches two ranks and prints the outcome; returns when both are ready."""
    command = script(folder, body)
    launcher = folder / "launcher.py"
    launcher.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from sft_trainer.launch import Gang, run_ranks\n"
        f"outcome = run_ranks(Gang(2, 2, 0, '127.0.0.1', 1), {command!r}, Path({str(folder)!r}))\n"
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
