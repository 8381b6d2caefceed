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
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from sft_api.run import ExitCode
from sft_trainer.voice import event_stream

SETTLE_SECONDS = 3.0
"""How long after the first failure the others' own accounts are waited for: the first to exit is rarely the cause."""


class Account(BaseModel):
    """What a rank says of its own end, in `account-<rank>.json` of the work folder."""

    code: int
    message: str
    step: int | None = None
    checkpoint_step: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this machine ended."""

    code: int
    message: str
    rank: int | None = None
    step: int | None = None
    checkpoint_step: int | None = None


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
        """A gang of one machine, or of several as PyTorchJob tells them: RANK and WORLD_SIZE count pods."""
        nodes, node = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
        address = environment.get("MASTER_ADDR", "127.0.0.1")
        port = int(environment["MASTER_PORT"]) if nodes > 1 else free_port()
        return cls(processes, nodes * processes, node * processes, address, port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(gang: Gang, command: list[str], work: Path) -> Outcome:
    """Run `command` once for each rank of this machine and wait until all have ended.

    SIGTERM or SIGINT is passed on once, as SIGTERM: the ranks agree on a step, save and exit 30. The second time they
    are killed.
    """
    children = [start(gang, command, work, local_rank) for local_rank in range(gang.processes)]
    supervisor = Supervisor(children)
    previous = {number: signal.signal(number, supervisor.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        supervisor.wait()
    finally:
        supervisor.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if supervisor.signals > 1:
        return Outcome(128 + signal.SIGINT, "stopped at once; what was committed before counts")
    ends = [
        End(child.returncode, child in supervisor.killed, read_account(work, gang.first_rank + local))
        for local, child in enumerate(children)
    ]
    return cause(ends, gang.first_rank)


@dataclass(frozen=True)
class End:
    """How one rank ended: its exit code (negative: the signal), whether we killed it, and what it said itself."""

    code: int
    killed_by_us: bool
    account: Account | None


def start(gang: Gang, command: list[str], work: Path, local_rank: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(gang.first_rank + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(gang.world),
        "LOCAL_WORLD_SIZE": str(gang.processes),
        "LOCAL_SIZE": str(gang.processes),
        "MASTER_ADDR": gang.address,
        "MASTER_PORT": str(gang.port),
        "SFT_WORK": str(work),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // gang.processes)))
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=event_stream(), start_new_session=True)


class Supervisor:
    """Waits for the ranks; ends the others when one has failed."""

    def __init__(self, children: list[subprocess.Popen[bytes]]):
        self.children = children
        self.signals = 0
        self.killed: set[subprocess.Popen[bytes]] = set()

    def on_signal(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals > 1:
            self.kill()
        else:
            for child in self.children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        failed_at: float | None = None
        while None in (codes := [child.poll() for child in self.children]):
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > SETTLE_SECONDS and not self.signals:
                self.kill()
            self._wait_for_any(0.2)

    def _wait_for_any(self, seconds: float) -> None:
        running = next((child for child in self.children if child.poll() is None), None)
        if running is not None:
            try:
                running.wait(seconds)
            except subprocess.TimeoutExpired:
                return

    def kill(self) -> None:
        """End whatever still runs, with its own children."""
        for child in self.children:
            if child.poll() is None:
                self.killed.add(child)
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def cause(ends: list[End], first_rank: int) -> Outcome:
    """The outcome of the gang: what stopped the first rank, rather than the complaints of those it left behind."""
    local = min(range(len(ends)), key=lambda index: (distance_from_cause(ends[index]), index))
    end, rank = ends[local], first_rank + local
    if end.account is not None and end.account.code == end.code:
        return Outcome(end.code, end.account.message, rank, end.account.step, end.account.checkpoint_step)
    if end.code < 0:
        return Outcome(128 - end.code, f"rank {rank} was killed by {signal.Signals(-end.code).name}", rank)
    if end.code > 0:
        return Outcome(end.code, f"rank {rank} ended with exit code {end.code}; its last words are in the log", rank)
    return Outcome(0, "completed", rank)


def distance_from_cause(end: End) -> int:
    """0 is the likeliest cause. A rank that lost its peers complains of communication: believe it last."""
    if end.code == 0:
        return 4
    if end.killed_by_us:
        return 3
    if end.account is not None and end.account.code == ExitCode.COMMUNICATION:
        return 2
    if end.account is not None and end.account.code == ExitCode.PREEMPTED:
        return 1
    return 0


def read_account(work: Path, rank: int) -> Account | None:
    path = work / f"account-{rank}.json"
    return Account.model_validate_json(path.read_text()) if path.exists() else None


def write_account(work: Path, rank: int, account: Account) -> None:
    """Called by a rank at its end; whole or not at all."""
    partial = work / f".account-{rank}.json"
    partial.write_text(account.model_dump_json())
    partial.rename(work / f"account-{rank}.json")
