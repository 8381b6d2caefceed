"""The attempts of a peer at one run: each a process of its own that is interrupted where `benchmarks.resume` says.

The process that imported the peer forks once for every attempt: imports cost more than these runs.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sft_api.run import RunConfig
from sft_trainer.preparation import cache_folder, data_store, prepared_job
from sft_trainer.prepare import Dataset

STOPPED = 30
"""The exit code of an attempt that ended because it was told to."""
CRASHED = 1


class How(enum.StrEnum):
    """How attempts are interrupted."""

    NEVER = "never"
    KILL = "kill"
    """SIGKILL in the first forward pass of the step after."""
    STOP = "stop"
    """SIGTERM in the first forward pass of the step after: the notice that Kubernetes gives."""
    KILL_IN_SAVE = "killInSave"
    """SIGKILL in the middle of the next checkpoint."""


@dataclass(frozen=True)
class Task:
    """One run. `after`: attempt i is interrupted when it has taken `after[i]` steps; those beyond are left alone."""

    config: RunConfig
    work: Path
    how: How
    after: tuple[int, ...]
    save_steps: int
    packing: bool

    @property
    def ledger(self) -> Path:
        return self.work / "ledger.jsonl"


class Attempt:
    """One attempt, told of what it does; interrupts its own process when it is time."""

    def __init__(self, task: Task, number: int):
        self.task = task
        self.steps = 0
        self.is_told = False
        self._after = task.after[number] if number < len(task.after) else None
        self.note("begin")

    def note(self, event: str, **about: Any) -> None:
        """A line of the ledger: see `benchmarks.ledger`."""
        with self.task.ledger.open("a") as file:
            file.write(json.dumps({"event": event, **about}) + "\n")

    def step(self, epoch: int, samples: list[int]) -> None:
        self.note("step", epoch=epoch, samples=samples)
        self.steps += 1

    def in_step(self, stop: Callable[[], None]) -> None:
        """Within a step, before its gradient is known. `stop`: hand the peer the notice to stop."""
        if not self._is_due:
            return
        if self.task.how is How.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.task.how is How.STOP and not self.is_told:
            self.is_told = True
            stop()

    def in_save(self) -> None:
        """Within a save: some of its files are there, others are not."""
        if self._is_due and self.task.how is How.KILL_IN_SAVE:
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def _is_due(self) -> bool:
        return self._after is not None and self.steps >= self._after


class Samples:
    """Knows a sample by its token ids, so that what is counted is what entered the model."""

    def __init__(self, config: RunConfig):
        phase = prepared_job(config).phases[0]
        self.dataset = Dataset.open(data_store(config), phase, cache_folder() / "data")
        self._index = {self.dataset.tokens(index)[0].tobytes(): index for index in range(len(self.dataset))}
        assert len(self._index) == len(self.dataset), "two samples with the same tokens cannot be told apart"

    def find(self, ids: list[int]) -> int:
        """The sample with exactly these tokens. KeyError: there is none, so it was cut or mixed with another."""
        return self._index[np.array(ids, np.int32).tobytes()]

    def rows(self, ids: Any, attention_mask: Any) -> list[int]:
        """Of padded token ids [samples, longest]."""
        return [self.find(row[kept.bool()].tolist()) for row, kept in zip(ids, attention_mask, strict=True)]

    def packed(self, ids: Any, position_ids: Any) -> list[int]:
        """Of one packed row [1, tokens], in which positions begin at 0 with every sample."""
        starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        return [self.find(ids[0, start:end].tolist()) for start, end in pairwise(starts)]


def parameters_digest(named_parameters: Iterable[tuple[str, Any]]) -> str:
    """Equal where all parameters are equal, bit by bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted(named_parameters, key=lambda item: item[0]):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def carry_out(attempt: Callable[[Attempt], None]) -> None:
    """The runs that the command line asks for, by `attempt`; prints {how: {"ended", "error"}} as its last line.

    `attempt` returns when its run is done or was told to stop.
    """
    asked = json.loads(sys.argv[1])
    config = RunConfig.model_validate_json(Path(asked["run"]).read_text())
    ended = {}
    for how, after in asked["after"].items():
        work = Path(asked["work"]) / how
        work.mkdir(parents=True)
        task = Task(config, work, How(how), tuple(after), asked["saveSteps"], asked["packing"])
        ended[how] = _run(task, attempt)
    print(json.dumps(ended))


def _run(task: Task, attempt: Callable[[Attempt], None]) -> dict[str, str]:
    """Start attempts until one is done; one that fails uninterrupted would fail again, and is the last."""
    number = 0
    while True:
        error = task.work / f"error-{number}"
        code = _fork(task, number, attempt, error)
        if code not in (-signal.SIGKILL, STOPPED):
            message = error.read_text() if error.exists() else f"exit code {code}"
            return {"ended": "finished", "error": ""} if code == 0 else {"ended": "failed", "error": message}
        number += 1


def _fork(task: Task, number: int, run: Callable[[Attempt], None], error: Path) -> int:
    """The exit code of one attempt, negative where a signal ended it."""
    if (pid := os.fork()) != 0:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = CRASHED
    try:
        attempt = Attempt(task, number)
        run(attempt)
        code = STOPPED if attempt.is_told else 0
    except BaseException as problem:  # whatever it is, this process must not go on as the one that forked it
        traceback.print_exc()
        error.write_text(f"{type(problem).__name__}: {problem}")
    finally:
        sys.stderr.flush()
        os._exit(code)
