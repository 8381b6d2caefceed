"""Ranks that stay alive through the test session, so that a test of a collective costs its cases and not its imports.

    def norms(stage: int) -> float: ...            # a module-level function; runs on every rank

    def test_something(gang: Gangs) -> None:
        first, second = gang(2).run(norms, 3)      # one result a rank

A gang is started when it is first asked for. Its ranks have one thread each and are in a gloo process group, joined as
the trainer joins it. A case that fails or hangs is reported with its rank's traceback or stacks and the tail of its
log; that gang is then ended and the next case gets a fresh one.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 240.0
"""Imports of torch and deepspeed on a busy machine."""
CASE_SECONDS = 180.0
GRACE_SECONDS = 5.0
"""How long the other ranks have after one failed: they may only be waiting for it."""
LOG_TAIL = 6000
RANK_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""What must be set before torch and deepspeed are imported."""
PRELOADED = [
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # the first ZeRO engine of a process imports it, and the compiler
]


class GangFailure(AssertionError):
    """A case failed, hung, or took its rank with it."""


@dataclass
class Rank:
    process: BaseProcess
    connection: Connection
    log: Path


@dataclass(frozen=True)
class Answer:
    """What a rank sends back: a result, or the traceback of what was raised."""

    result: Any = None
    error: str | None = None


class Gang:
    """`world` rank processes."""

    def __init__(self, world: int, folder: Path):
        self.world = world
        self.ranks, self._store = start_ranks(world, folder)
        self._answers("the start of the gang", START_SECONDS)

    def run(self, case: Callable[..., Any], *arguments: Any, seconds: float = CASE_SECONDS) -> list[Any]:
        """`case(*arguments)` on every rank; the results in the order of the ranks."""
        task = pickle.dumps((case, arguments))
        for rank in self.ranks:
            rank.connection.send_bytes(task)
        return [answer.result for answer in self._answers(case.__qualname__, seconds)]

    @property
    def is_alive(self) -> bool:
        return bool(self.ranks)

    def end(self) -> None:
        """End the processes. Closing the connection asks them to; a rank in the middle of something is killed."""
        for rank in self.ranks:
            rank.connection.close()
        for rank in self.ranks:
            rank.process.join(0.5)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()
        self.ranks = []

    def _answers(self, what: str, seconds: float) -> list[Answer]:
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < self.world:
            waiting = [rank.connection for index, rank in enumerate(self.ranks) if index not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for index, rank in enumerate(self.ranks):
                if rank.connection in ready:
                    answers[index] = receive(rank.connection)
                    if answers[index].error is not None:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(answers) == self.world and all(answer.error is None for answer in answers.values()):
            return [answers[index] for index in range(self.world)]
        report = self._report(what, answers)
        self.end()
        raise GangFailure(report)

    def _report(self, what: str, answers: dict[int, Answer]) -> str:
        lines = [f"{what} failed on a gang of {self.world}"]
        for index, rank in enumerate(self.ranks):
            if index not in answers:
                dump_stacks(rank)
            answer = answers.get(index, Answer(error="no answer in time; where it was stands in its log"))
            if answer.error is not None:
                lines += [f"── rank {index}: {answer.error}", "   its log:", rank.log.read_text()[-LOG_TAIL:]]
        return "\n".join(lines)


def start_ranks(world: int, folder: Path) -> tuple[list[Rank], Any]:
    """The processes, and the store at which they meet: ours, for a port that is chosen by binding is never taken."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    imported = server_with_imports()
    ranks = []
    for index in range(world):
        ours, theirs = imported.Pipe()
        log = folder / f"world-{world}-rank-{index}-{time.monotonic_ns()}.log"
        process = imported.Process(target=live, args=(index, world, store.port, theirs, log), daemon=True)
        process.start()
        theirs.close()
        ranks.append(Rank(process, ours, log))
    return ranks, store


def server_with_imports() -> ForkServerContext:
    """Processes forked from one that has imported torch, transformers and deepspeed: seconds each, saved per rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = {name: os.environ.get(name) for name in RANK_ENVIRONMENT}
    os.environ.update(RANK_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def receive(connection: Connection) -> Answer:
    try:
        answer: Answer = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return Answer(error="the process ended without an answer")
    return answer


def dump_stacks(rank: Rank) -> None:
    """Let a rank that hangs write the stacks of its threads into its log."""
    if rank.process.is_alive() and rank.process.pid is not None:
        os.kill(rank.process.pid, signal.SIGUSR1)
        rank.process.join(1.0)  # it goes on; this gives it the time to write


def live(index: int, world: int, port: int, connection: Connection, log: Path) -> None:
    """A rank's life: join the gang, run what is sent, until the connection closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's, which ends us
    os.environ.update(
        {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    )
    answer(connection, join)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # nothing to be tidied, and the peers may be gone already
        answer(connection, partial(call, task))


def join() -> None:
    import torch

    from sft_trainer.engine import init_distributed

    gc.freeze()  # what is imported stays; deepspeed collects garbage by hand when it sets up an engine
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"), timedelta(seconds=CASE_SECONDS))


def call(task: bytes) -> Any:
    case, arguments = pickle.loads(task)
    return case(*arguments)


def answer(connection: Connection, what: Callable[[], Any]) -> None:
    try:
        message = pickle.dumps(Answer(result=what()))
    except BaseException:
        message = pickle.dumps(Answer(error=traceback.format_exc()))
    sys.stdout.flush()
    connection.send_bytes(message)


class Gangs:
    """The session's gangs, one for each world size that was asked for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._gangs: dict[int, Gang] = {}

    def __call__(self, world: int) -> Gang:
        """The gang of `world` ranks, started now if it is the first time or the last one was ended."""
        gang = self._gangs.get(world)
        if gang is None or not gang.is_alive:
            gang = self._gangs[world] = Gang(world, self._folder)
        return gang

    def end(self) -> None:
        for gang in self._gangs.values():
            gang.end()


@pytest.fixture(scope="session")
def gang() -> Iterator[Gangs]:
    """`gang(n)`: n gloo ranks for the whole session."""
    with tempfile.TemporaryDirectory(prefix="gang-") as folder:
        gangs = Gangs(Path(folder))
        yield gangs
        gangs.end()
