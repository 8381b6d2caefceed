"""When to save, what a save says of the run, and where to go on: between the loop and the checkpoint protocol."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from sft_api.events import CheckpointCommitted, Message
from sft_api.run import RunConfig
from sft_trainer.checkpoint import Checkpoint, CheckpointMeta, CheckpointWriter, complete_places, newest_complete
from sft_trainer.checkpoint.rng import capture_rng, restore_rng
from sft_trainer.engine import Engine
from sft_trainer.prepare import PreparedJob
from sft_trainer.ranks import Ranks
from sft_trainer.schedule import Cursor, Schedule
from sft_trainer.signals import Signals
from sft_trainer.store import Store
from sft_trainer.validation import crossed

LIBRARIES = ("sftjob", "torch", "transformers", "deepspeed")


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
        staging: Path,
    ):
        self.config, self.store, self.attempt, self.stage = config, store, attempt, stage
        self.schedule, self.ranks, self.signals, self.staging = schedule, ranks, signals, staging
        self.fingerprints = identity(config, prepared)
        self._stall_seconds = 0.0
        self.committed_step: int | None = None
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
            self.committed_step = step
        self._writer = CheckpointWriter(
            self.store,
            attempt=self.attempt,
            rank=self.ranks.rank,
            world=self.ranks.world,
            staging=self.staging,
            keep=self.config.checkpoints.keep,
            resumed_from=step if checkpoint else None,
            before_commit=self.signals.flush,
            on_commit=self._on_commit,
        )
        self._last_save = time.monotonic()
        return Cursor(**checkpoint.meta.cursor) if checkpoint else self.schedule.start()

    @property
    def keeps_the_best(self) -> bool:
        """Whether checkpoints are compared by their held-out loss, so that each needs one."""
        return self.config.checkpoints.keep.best > 0

    def minutes_are_up(self) -> bool:
        """Whether this rank's clock says that a save is due; the first rank's counts."""
        minutes = self.config.checkpoints.every.minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def due(self, before: Cursor, after: Cursor, minutes_are_up: bool) -> bool:
        """Whether to save after the step between the two positions: always at a phase's end."""
        every = self.config.checkpoints.every
        return self.schedule.is_phase_end(after) or minutes_are_up or crossed(every, before, after)

    def save(self, engine: Engine, before: Cursor, after: Cursor, digest: str, validation_loss: float | None) -> None:
        """Stage this rank's state, and upload and commit it while training goes on."""
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
            time=time.time(),
        )
        self._stall_seconds += self._writer.save(engine.pieces(), capture_rng(), meta)
        self._last_save = time.monotonic()

    def take_stall_seconds(self) -> float:
        """How long saves have held training up since this was last asked."""
        taken, self._stall_seconds = self._stall_seconds, 0.0
        return taken

    def wait(self) -> None:
        """Return when what was saved is committed."""
        assert self._writer is not None
        self._writer.wait()

    def _on_commit(self, event: CheckpointCommitted) -> None:
        self.committed_step = event.step
        self.signals.emit(event)

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
