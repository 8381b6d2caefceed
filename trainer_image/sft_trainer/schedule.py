"""Where a run is: phases, epochs and steps as positions, and the learning rate at each. Pure; resuming is a seek."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from sft_api.run import ExitCode, ResolvedPhase, RunError
from sft_api.spec import LearningRateSchedule, Warmup


@dataclass(frozen=True)
class PhaseSteps:
    """How many steps a phase takes. The last step of each epoch takes the remainder."""

    name: str
    num_samples: int
    effective_batch_size: int
    epochs: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int


@dataclass(frozen=True)
class Cursor:
    """The position before the next step. Its fields are what a checkpoint keeps: `Cursor(**json)` brings it back."""

    phase: int = 0
    """Index of the phase; the number of phases where the job is done."""
    epoch: int = 0
    """Of this phase, from 0."""
    step_in_epoch: int = 0
    step: int = 0
    """Steps done since the job began."""
    samples: int = 0
    """Samples trained on since the job began."""
    tokens: int = 0
    loss_tokens: int = 0


class Schedule:
    """The steps of all phases, one phase after another.

    `num_samples` are the samples of each phase to train on. RunError where a phase has none, where a batch is larger
    than its phase, or where a warm-up is longer.
    """

    def __init__(self, phases: Sequence[ResolvedPhase], num_samples: Sequence[int]):
        assert len(phases) == len(num_samples)
        self._resolved = list(phases)
        self.phases = [self._count(index, num) for index, num in enumerate(num_samples)]
        self.total_steps = sum(phase.total_steps for phase in self.phases)

    def start(self) -> Cursor:
        return Cursor()

    def after(self, cursor: Cursor, samples: int, tokens: int, loss_tokens: int) -> Cursor:
        """The position after the step at `cursor`, which trained on so many samples, tokens and loss tokens."""
        assert not self.is_done(cursor)
        phase = self.phases[cursor.phase]
        cursor = replace(
            cursor,
            step_in_epoch=cursor.step_in_epoch + 1,
            step=cursor.step + 1,
            samples=cursor.samples + samples,
            tokens=cursor.tokens + tokens,
            loss_tokens=cursor.loss_tokens + loss_tokens,
        )
        if cursor.step_in_epoch == phase.steps_per_epoch:
            cursor = replace(cursor, epoch=cursor.epoch + 1, step_in_epoch=0)
        if cursor.epoch == phase.epochs:
            cursor = replace(cursor, phase=cursor.phase + 1, epoch=0)
        return cursor

    def step_in_phase(self, cursor: Cursor) -> int:
        return cursor.epoch * self.phases[cursor.phase].steps_per_epoch + cursor.step_in_epoch

    def is_phase_end(self, cursor: Cursor) -> bool:
        """Whether the last step done was a phase's last; `cursor.phase` is then the phase after it."""
        return cursor.step > 0 and cursor.epoch == cursor.step_in_epoch == 0

    def is_done(self, cursor: Cursor) -> bool:
        return cursor.phase == len(self.phases)

    def learning_rate(self, phase: int, step_in_phase: int) -> float:
        """The rate of a phase's step (from 0): a linear warm-up from its first step on, then the phase's schedule.

        Decays reach zero after the phase's last step, so that no step is thrown away.
        """
        optimizer, steps = self._resolved[phase].optimizer, self.phases[phase]
        assert 0 <= step_in_phase < steps.total_steps
        if step_in_phase < steps.warmup_steps:
            return optimizer.learning_rate * (step_in_phase + 1) / steps.warmup_steps
        done = (step_in_phase - steps.warmup_steps) / (steps.total_steps - steps.warmup_steps)
        return optimizer.learning_rate * _decay(optimizer.schedule, done)

    def _count(self, index: int, num_samples: int) -> PhaseSteps:
        phase = self._resolved[index]
        self._check_batch(index, num_samples)
        batch_size = phase.batch.effective_batch_size
        steps_per_epoch = -(-num_samples // batch_size)
        total_steps = steps_per_epoch * phase.epochs
        warmup_steps = _warmup_steps(phase.optimizer.warmup, total_steps)
        if warmup_steps > total_steps:
            raise RunError(
                ExitCode.CONFIGURATION,
                f"{warmup_steps:,} steps of warm-up are more than phase {phase.name} has: {total_steps:,} "
                f"({num_samples:,} samples, {batch_size:,} a step, {phase.epochs:,} epochs). Allowed are 0 to "
                f"{total_steps:,}; shorten the warm-up or train longer",
                path=self._path(index, "optimizer.warmup.steps"),
            )
        return PhaseSteps(phase.name, num_samples, batch_size, phase.epochs, steps_per_epoch, total_steps, warmup_steps)

    def _check_batch(self, index: int, num_samples: int) -> None:
        phase = self._resolved[index]
        if num_samples == 0:
            raise RunError(
                ExitCode.DATA,
                f"phase {phase.name} has no samples to train on. Give it data, or leave the phase out",
                path=phase.data_paths[0],
            )
        if phase.batch.effective_batch_size > num_samples:
            raise RunError(
                ExitCode.CONFIGURATION,
                f"{phase.batch.effective_batch_size:,} samples a step are more than phase {phase.name} has: "
                f"{num_samples:,}. Allowed are 1 to {num_samples:,}; make the batch smaller or add data",
                path=self._path(index, "batch.effectiveBatchSize"),
            )

    def _path(self, index: int, field: str) -> str:
        """Where the manifest would change this phase's value: the job's field where all phases share the value."""
        section, own = field.split(".")[0], self._resolved[index]
        if all(getattr(phase, section) == getattr(own, section) for phase in self._resolved):
            return f"spec.{field}"
        return f"{own.data_paths[0].split('.data[')[0]}.{field}"


def _warmup_steps(warmup: Warmup, total_steps: int) -> int:
    if warmup.ratio is not None:
        return math.ceil(Fraction(str(warmup.ratio)) * total_steps)  # as written: 0.07 of 100 are 7 steps, not 8
    return warmup.steps or 0


def _decay(schedule: LearningRateSchedule, done: float) -> float:
    match schedule:
        case LearningRateSchedule.CONSTANT:
            return 1.0
        case LearningRateSchedule.LINEAR:
            return 1.0 - done
        case LearningRateSchedule.COSINE:
            return 0.5 * (1.0 + math.cos(math.pi * done))
