"""When to save, what a save says of the run, and where to go on: between the loop and the checkpoint protocol."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft_api.events import Message
from sft_api.run import ExitCode, RunConfig, RunError
from sft_api.spec import Keep
from sft_trainer.checkpoint import Checkpoint, CheckpointMeta, CheckpointWriter, complete_places, newest_complete
from sft_trainer.checkpoint.rng import capture_rng, restore_rng
from sft_trainer.engine import Engine
from sft_trainer.heartbeat import Heartbeat
from sft_trainer.prepare import PreparedJob
from sft_trainer.progress import PROBLEM_LENGTH
from sft_trainer.ranks import Ranks
from sft_trainer.schedule import Cursor, Schedule
from sft_trainer.signals import Signals
from sft_trainer.store import Store
from sft_trainer.validation import crossed
from sft_trainer.voice import say

LIBRARIES = ("sftjob", "torch", "transformers", "deepspeed")
COMMIT_PATIENCE_SECONDS = 3600.0
"""How long a commit may be waited for: longer than the writers' own patience, which says what was missing."""
POLL_SECONDS = 0.2


class Saver:
    """A run's checkpoints, as the training loop sees them. Every rank has one and calls it at the same steps."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        attempt: int,
        prepared: PreparedJob,
        stage: int,
        schedule: Schedule,
        ranks: Ranks,
        signals: Signals,
        heartbeat: Heartbeat,
        staging: Path,
        keep: Callable[[], Keep],
    ):
        """`keep`: asked anew at every step and commit, for it may change."""
        self.config, self.store, self.attempt, self.stage = config, store, attempt, stage
        self.schedule, self.ranks, self.signals, self.staging = schedule, ranks, signals, staging
        self.heartbeat, self._keep = heartbeat, keep
        self.fingerprints = identity(config, prepared)
        self.resumed: Checkpoint | None = None
        """What this attempt went on from."""
        self.problem: str | None = None
        """What keeps this rank's newest save from going on."""
        self.productive_seconds = 0.0
        """Wall time of the steps that still count, through all attempts."""
        self._told: str | None = None
        self._stall_seconds = 0.0
        self._writer: CheckpointWriter | None = None
        self._last_save = time.monotonic()

    def restore(self, engine: Engine) -> Cursor:
        """Take over the newest complete checkpoint of this run, or start at the beginning; collective."""
        places = self._places_of_the_first_rank()
        checkpoint = newest_complete(self.store, self.fingerprints, self._warn, self._verify_together, places)
        step = checkpoint.meta.step if checkpoint else 0
        if checkpoint is not None:
            engine.restore(checkpoint)
            if checkpoint.meta.world_size == self.ranks.world and (state := checkpoint.rank_state(self.ranks.rank)):
                restore_rng(state)
            self.resumed = checkpoint
            self.productive_seconds = checkpoint.meta.productive_seconds
        self._writer = CheckpointWriter(
            self.store,
            attempt=self.attempt,
            rank=self.ranks.rank,
            world=self.ranks.world,
            staging=self.staging,
            keep=self._keep,
            resumed_from=step if checkpoint else None,
            before_commit=self.signals.flush,
            on_commit=self.signals.emit,
            on_problem=self._on_problem,
            bytes_per_second=upload_share(self.config),
            warn=self._warn,
        )
        self._last_save = time.monotonic()
        return Cursor(**checkpoint.meta.cursor) if checkpoint else self.schedule.start()

    @property
    def keeps_the_best(self) -> bool:
        """Whether checkpoints are compared by their held-out loss, so that each needs one; the first rank's counts."""
        return self._keep().best > 0

    @property
    def committed_step(self) -> int | None:
        """Step of the newest checkpoint that this rank knows to be committed."""
        return self._writer.committed_step if self._writer else None

    def minutes_are_up(self) -> bool:
        """Whether this rank's clock says that a save is due; the first rank's counts."""
        minutes = self.config.checkpoints.every.minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def due(self, before: Cursor, after: Cursor, minutes_are_up: bool) -> bool:
        """Whether to save after the step between the two positions: always at a phase's end."""
        every = self.config.checkpoints.every
        return self.schedule.is_phase_end(after) or minutes_are_up or crossed(every, before, after)

    def save(
        self,
        engine: Engine,
        before: Cursor,
        after: Cursor,
        digest: str,
        validation_loss: float | None,
        to_be_scored: bool,
    ) -> None:
        """Stage this rank's state, and upload and commit it while training goes on; collective.

        Waits first for the save before, if that is still on its way.
        """
        started = time.perf_counter()
        self.wait()
        self.heartbeat.beat(f"staging the checkpoint of step {after.step}")
        assert self._writer is not None
        meta = CheckpointMeta(
            step=after.step,
            phase=self.schedule.phases[before.phase].name,
            epoch=before.epoch + 1,
            phase_end=self.schedule.is_phase_end(after),
            cursor=asdict(after),
            samples=after.samples,
            tokens=after.tokens,
            loss_tokens=after.loss_tokens,
            world_size=self.ranks.world,
            zero_stage=self.stage,
            fingerprints=self.fingerprints,
            versions={library: version(library) for library in LIBRARIES},
            samples_digest=digest,
            validation_loss=validation_loss,
            to_be_scored=to_be_scored,
            productive_seconds=self.productive_seconds,
            time=time.time(),
        )
        self._writer.save(engine.pieces(), capture_rng(), meta, waited=time.perf_counter() - started)
        self._stall_seconds += time.perf_counter() - started
        self._last_save = time.monotonic()

    def hear_of_problems(self, has_one: NDArray[np.float64]) -> None:
        """Take in which ranks' saves do not come through: the first tells of all."""
        ranks = has_one.nonzero()[0]
        words = f"rank {ranks[0]} cannot save its state; the log of its machine says why" if len(ranks) else None
        if words != self._told and self.problem is None:
            self._told = words
            self.signals.know(checkpoint_problem=words)

    def take_stall_seconds(self) -> float:
        """How long saves have held training up since this was last asked."""
        taken, self._stall_seconds = self._stall_seconds, 0.0
        return taken

    def wait(self) -> None:
        """Return when what was saved is committed; collective, so that the end of a rank ends the wait of the others.

        What keeps any rank from it is raised on all.
        """
        assert self._writer is not None
        self.heartbeat.beat("waiting for a checkpoint to be committed", COMMIT_PATIENCE_SECONDS)
        seconds = 0.0
        while True:
            settled = self._writer.has_settled(seconds)
            everyone = self.ranks.gather([settled, exit_code(self._writer.failure)])
            if everyone[:, 1].any() or everyone[:, 0].all():
                break
            seconds = POLL_SECONDS
        if self._writer.failure is not None or not everyone[:, 1].any():
            self._writer.wait()
            return
        failed = int(everyone[:, 1].nonzero()[0][0])
        code = int(everyone[failed, 1])
        message = f"rank {failed} could not save its state; the log of its machine says why"
        raise RunError(ExitCode(code) if code in list(ExitCode) else ExitCode.COMMUNICATION, message)

    def _on_problem(self, problem: str | None) -> None:
        if problem is not None and problem != self.problem:
            words = f"the checkpoint does not come through and is tried again: {problem}"
            say(Message(level="warning", text=words))
        self.problem = problem
        self.signals.know(checkpoint_problem=problem and problem[:PROBLEM_LENGTH])

    def _warn(self, text: str) -> None:
        self.signals.emit(Message(level="warning", text=text))

    def _places_of_the_first_rank(self) -> list[tuple[int, int]]:
        """Step and attempt of the checkpoints to try, the same on every rank; collective."""
        mine = complete_places(self.store) if self.ranks.is_first else []
        count = int(self.ranks.gather([len(mine)])[0, 0])
        flat = [number for place in mine for number in place] or [0] * (2 * count)
        first = self.ranks.gather(flat)[0] if count else []
        return [(int(first[i]), int(first[i + 1])) for i in range(0, 2 * count, 2)]

    def _verify_together(self, checkpoint: Checkpoint) -> str | None:
        """Each rank reads its share of the shards; what any of them found wrong counts for all; collective."""
        share = range(self.ranks.rank, len(checkpoint.manifest.shards), self.ranks.world)
        problem = checkpoint.verify(share)
        broken = self.ranks.gather([problem is not None])[:, 0].any()
        return problem or ("another rank found it damaged" if broken else None)


def upload_share(config: RunConfig) -> float | None:
    """Bytes a second that this rank may upload: its part of what its machine may. None: no limit."""
    limit = config.checkpoints.upload_megabytes_per_second
    return limit and 1e6 * limit / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def exit_code(failure: BaseException | None) -> int:
    """0 where there is none; 1 for what has no code of its own."""
    if failure is None:
        return 0
    return int(failure.code) if isinstance(failure, RunError) else 1


def identity(config: RunConfig, prepared: PreparedJob) -> dict[str, str]:
    """What makes a run the one it is, by the field that says it: a checkpoint of any other may not be gone on from.

    Where it runs is no part of it: neither ranks, ZeRO stage, attention and memory, nor where and how often it saves.
    """
    model, validation = config.model, config.validation
    facts: dict[str, object] = {
        "spec.seed": config.seed,
        "spec.model": model.model_dump(mode="json"),
        "spec.trainer.precision": config.trainer.precision,
        "spec.validation": [validation and validation.fraction, prepared.validation],
    }
    for index, (phase, fingerprint) in enumerate(zip(config.phases, prepared.phases, strict=True)):
        batch = phase.batch
        facts[f"phase {index} ({phase.name}): data"] = [fingerprint, phase.lengths]
        facts[f"phase {index} ({phase.name}): epochs"] = phase.epochs
        facts[f"phase {index} ({phase.name}): batch"] = [batch.effective_batch_size, batch.max_sequence_length]
        facts[f"phase {index} ({phase.name}): optimizer"] = phase.optimizer.model_dump(mode="json")
    return {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}
