"""The held-out data, scored as exactly as the training loss: Σ cross-entropy over all ranks / Σ loss tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sft_api.events import ValidationMetrics
from sft_api.spec import CheckpointInterval, Interval
from sft_trainer.batches import MicroBatch, micro_batches, to_device
from sft_trainer.engine import Engine
from sft_trainer.heartbeat import Heartbeat
from sft_trainer.plan import Packer
from sft_trainer.ranks import Ranks
from sft_trainer.schedule import Cursor
from sft_trainer.split import HeldOut
from sft_trainer.stopping import Stopping

CHUNK_SAMPLES = 2048
"""Samples planned at a time: bounds the memory for their tensors, and how long a stop waits; changes no figure."""


@dataclass(frozen=True)
class Validation:
    """What to score and how often, besides before the first step and at each phase's end."""

    parts: list[HeldOut]
    every: Interval | None
    packer: Packer
    capacity: int
    chunk_samples: int = CHUNK_SAMPLES

    def due(self, before: Cursor, after: Cursor) -> bool:
        """Whether the step between the two calls for a score. `after` at the start of a phase is the last one's end."""
        if not self.parts:
            return False
        ends_phase = after.phase != before.phase
        return ends_phase or crossed(self.every, before, after)

    def score(
        self, engine: Engine, ranks: Ranks, step: int, phase: str, stop: Stopping, heartbeat: Heartbeat
    ) -> ValidationMetrics | None:
        """Score all held-out samples with the weights as they are; collective. None where told to stop on the way."""
        started = time.perf_counter()
        loss_sum, hits = 0.0, 0
        with engine.evaluating():
            for number, chunk in enumerate(self._chunks(ranks)):
                if number > 0 and stop.agree():
                    return None
                heartbeat.beat(f"scoring the held-out data after step {step}")
                for micro_batch in chunk:
                    part_sum, part_hits = engine(**to_device(micro_batch, ranks.device))
                    loss_sum += float(part_sum)
                    hits += int(part_hits)
        total = ranks.gather([loss_sum, hits]).sum(axis=0)
        loss_tokens = sum(int(part.dataset.num_loss_tokens[part.samples].sum(dtype=np.int64)) for part in self.parts)
        return ValidationMetrics(
            step=step,
            phase=phase,
            loss=total[0] / loss_tokens,
            accuracy=total[1] / loss_tokens,
            samples=sum(len(part.samples) for part in self.parts),
            loss_tokens=loss_tokens,
            seconds=time.perf_counter() - started,
            time=time.time(),
        )

    def _chunks(self, ranks: Ranks) -> Iterator[Iterable[MicroBatch]]:
        """This rank's micro-batches, in as many chunks on every rank."""
        for part in self.parts:
            for start in range(0, len(part.samples), self.chunk_samples):
                chunk = part.samples[start : start + self.chunk_samples]
                plan = self.packer.plan(part.dataset.lengths[chunk], self.capacity)
                yield micro_batches(part.dataset, chunk, plan, ranks.rank, self.packer.padded)


def crossed(every: Interval | CheckpointInterval | None, before: Cursor, after: Cursor) -> bool:
    """Whether a multiple of the interval lies in (before, after]: no batch size can step over it unseen."""
    if every is None:
        return False
    if every.steps is not None:
        return after.step // every.steps != before.step // every.steps
    if every.samples is not None:
        return after.samples // every.samples != before.samples // every.samples
    return False
