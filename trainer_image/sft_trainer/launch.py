"""Start this machine's ranks, watch over them, and end as the first of them that failed.

Not torchrun: a gang here never changes its size and never re-admits a rank, and torchrun's agent ends in 1 whatever
happened to its ranks. What is needed is small: start, forward SIGTERM, and find the cause among the exit codes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sft_api.report import TrainerReport
from sft_api.run import ExitCode
from sft_trainer.ending import Account, End, Outcome, cause, read_account
from sft_trainer.hang import Hang, find_hang, tell_stacks
from sft_trainer.heartbeat import JOINING, Heartbeat, read_beat
from sft_trainer.progress import read_report
from sft_trainer.voice import event_stream

JOIN_PATIENCE_SECONDS = 3600.0
"""How long the ranks may take to meet, whatever the hang time-out: they give up themselves before that."""
POLL_SECONDS = 0.2
NO_FAILURE = (0, ExitCode.PREEMPTED)
TOO_EARLY = "told to stop before the ranks had met; run again to go on"


@dataclass(frozen=True)
class Gang:
    """The gang's shape and where it meets. `first_rank` is that of this machine's first process."""

    processes: int
    world: int
    first_rank: int
    address: str
    port: int

    @classmethod
    def from_environment(cls, processes: int, environment: Mapping[str, str]) -> Gang:
        """A gang of one machine, or of as many pods as the training operator says.

        Its RANK and WORLD_SIZE are not asked: the one counts pods, the other processes.
        """
        nodes, node = int(environment.get("PET_NNODES", "1")), int(environment.get("PET_NODE_RANK", "0"))
        if nodes == 1:
            return cls(processes, processes, 0, "127.0.0.1", free_port())
        port = int(environment["MASTER_PORT"])
        return cls(processes, nodes * processes, node * processes, environment["MASTER_ADDR"], port)

    @property
    def ranks(self) -> range:
        """Of this machine."""
        return range(self.first_rank, self.first_rank + self.processes)


@dataclass(frozen=True)
class Limits:
    """How long the ranks may take."""

    hang_seconds: float
    """For one step, or anything else that comes to no end."""
    grace_seconds: float
    """To save and end, once told to stop."""
    settle_seconds: float = 3.0
    """To give their own accounts after the first failure: the first to exit is rarely the cause."""
    stacks_seconds: float = 5.0
    """To write their stacks when they hang, and for other machines' launchers to see that their ranks hang as well:
    when ours are killed, theirs end of a lost connection."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(gang: Gang, command: list[str], work: Path, limits: Limits, threads: int) -> Outcome:
    """Run `command` once for each rank of this machine, with so many threads, and wait until all have ended.

    SIGTERM or SIGINT is passed on once, as SIGTERM: the ranks agree on a step, save and exit 30. The second time they
    are killed.
    """
    supervisor = Supervisor(work, limits)
    previous = {number: signal.signal(number, supervisor.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in gang.ranks:
            if not supervisor.signals:
                supervisor.children[rank] = start(gang, command, work, rank, threads)
        supervisor.wait()
    finally:
        supervisor.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return with_report(supervisor.outcome(gang.first_rank), read_report(work))


def with_report(outcome: Outcome, report: TrainerReport | None) -> Outcome:
    """The outcome with what the first rank last knew, and with that for what the likeliest cause did not say itself."""
    if report is None:
        return outcome
    step = outcome.step if outcome.step is not None or report.progress is None else report.progress.step
    committed = report.checkpoint.step if report.checkpoint else outcome.checkpoint_step
    return replace(outcome, report=report, step=step, checkpoint_step=committed)


def start(gang: Gang, command: list[str], work: Path, rank: int, threads: int) -> subprocess.Popen[bytes]:
    heartbeat = Heartbeat(work, rank)
    heartbeat.beat(JOINING, JOIN_PATIENCE_SECONDS)
    heartbeat.close()
    local_rank = str(rank - gang.first_rank)
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": str(gang.world),
        "LOCAL_WORLD_SIZE": str(gang.processes),
        "LOCAL_SIZE": str(gang.processes),
        "MASTER_ADDR": gang.address,
        "MASTER_PORT": str(gang.port),
        "SFT_WORK": str(work),
        "SFT_LAUNCHER": str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=event_stream(), start_new_session=True)


class Supervisor:
    """Waits for the ranks; ends the others when one has failed, and all when they hang or take too long to stop."""

    def __init__(self, work: Path, limits: Limits):
        self.work, self.limits = work, limits
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.signals = 0
        self.killed: set[int] = set()
        self._told_at: float | None = None
        self._failed_at: float | None = None
        self._hang: Hang | None = None
        self._stopped: str | None = None
        """Why we ended ranks that were told to stop."""

    def on_signal(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals > 1:
            self.kill()
            return
        self._told_at = time.monotonic()
        for child in self.children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        while any(child.poll() is None for child in self.children.values()):
            self._end_what_goes_no_further()
            self._wait_for_any(POLL_SECONDS)

    def outcome(self, first_rank: int) -> Outcome:
        """How the ranks, now ended, came to their end."""
        if self.signals > 1:
            return Outcome(128 + signal.SIGINT, "stopped at once; what was committed before counts")
        if self._hang is not None:
            return Outcome(ExitCode.HUNG, self._hang.message, self._hang.rank)
        if self._stopped is not None:
            return Outcome(ExitCode.PREEMPTED, self._stopped)
        if not self.children:
            return Outcome(ExitCode.PREEMPTED, TOO_EARLY)
        return cause([self._end(rank, child.returncode) for rank, child in self.children.items()], first_rank)

    def _end(self, rank: int, code: int) -> End:
        account = read_account(self.work, rank)
        if account is None and self._is_too_early(code):
            account = Account(code=ExitCode.PREEMPTED, message=TOO_EARLY)
            code = ExitCode.PREEMPTED
        return End(code, rank in self.killed, account)

    def _is_too_early(self, code: int) -> bool:
        """Whether a rank that ended so was told to stop before it could listen."""
        return self.signals > 0 and code in (ExitCode.PREEMPTED, -signal.SIGTERM)

    def _end_what_goes_no_further(self) -> None:
        now = time.monotonic()
        ended = [code for child in self.children.values() if (code := child.poll()) is not None]
        if self._failed_at is None and any(code not in NO_FAILURE and not self._is_too_early(code) for code in ended):
            self._failed_at = now
        if self._failed_at is not None:
            if now - self._failed_at > self.limits.settle_seconds:
                self.kill()
        elif self._told_at is not None and self._is_joining():
            self._stopped = TOO_EARLY
            self.kill()
        elif self._told_at is not None and now - self._told_at > self.limits.grace_seconds:
            seconds = f"{self.limits.grace_seconds:,.0f} s"
            self._stopped = f"told to stop, and not done with saving after {seconds}: what was committed before counts"
            self.kill()
        elif hang := find_hang(self.children, self.work, self.limits.hang_seconds):
            tell_stacks(self.children, self.work, self.limits.stacks_seconds)
            self._hang = hang
            self.kill()

    def _is_joining(self) -> bool:
        """Whether a rank still waits for others, where it cannot hear that it should stop."""
        beats = (read_beat(self.work, rank) for rank, child in self.children.items() if child.poll() is None)
        return any(beat is not None and beat.stage == JOINING for beat in beats)

    def _wait_for_any(self, seconds: float) -> None:
        running = next((child for child in self.children.values() if child.poll() is None), None)
        if running is not None:
            try:
                running.wait(seconds)
            except subprocess.TimeoutExpired:
                return

    def kill(self) -> None:
        """End whatever still runs, with its own children."""
        for rank, child in self.children.items():
            if child.poll() is None:
                self.killed.add(rank)
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
