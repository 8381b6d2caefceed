"""What the trainer is told and how it answers: the resolved job, exit codes, and the errors that carry them."""

from __future__ import annotations

from enum import IntEnum, StrEnum

from sft_api.base import ApiModel
from sft_api.pods import Lifecycle
from sft_api.spec import (
    Compute,
    DataSource,
    LearningRateSchedule,
    Model,
    OptimizerState,
    Overlong,
    Packing,
    Saving,
    Validation,
    Warmup,
)


class ExitCode(IntEnum):
    """How the trainer and `sft run` end. 10 to 15 are permanent: the same run would end the same way."""

    COMPLETED = 0
    CONFIGURATION = 10
    DATA = 11
    MODEL = 12
    STORE_REFUSED = 13
    OUT_OF_MEMORY = 14
    DIVERGED = 15
    PREEMPTED = 30
    HUNG = 31
    COMMUNICATION = 32
    STORE_UNAVAILABLE = 33


PERMANENT = (
    ExitCode.CONFIGURATION,
    ExitCode.DATA,
    ExitCode.MODEL,
    ExitCode.STORE_REFUSED,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.DIVERGED,
)
"""Trying again would end the same way."""


class RunError(Exception):
    """A run that cannot go on, for a reason that its user can act on.

    `message` is one sentence or two: what was given, what is allowed, what to do. `path` is the field of the
    manifest as the user spelled it (`spec.phases[1].data[0].uri`) where one is to blame.
    """

    def __init__(self, code: ExitCode, message: str, path: str | None = None):
        super().__init__(f"{path}: {message}" if path else message)
        self.code = code
        self.message = message
        self.path = path


class Lengths(StrEnum):
    """Which of a phase's samples, by their length: all, or one half of the data set (ByLength)."""

    ALL = "All"
    SHORTER = "Shorter"
    LONGER = "Longer"


class ResolvedBatch(ApiModel):
    """`spec.batch` with every field filled in."""

    effective_batch_size: int
    max_tokens_per_gpu: int
    max_sequence_length: int
    overlong: Overlong


class ResolvedOptimizer(ApiModel):
    """`spec.optimizer` with every field filled in."""

    learning_rate: float
    schedule: LearningRateSchedule
    warmup: Warmup
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    state: OptimizerState


class ResolvedPhase(ApiModel):
    """A phase as the trainer walks it. Stacked is one phase, ByLength two; the trainer knows no strategies."""

    name: str
    data: list[DataSource]
    data_paths: list[str]
    """For each source, the field of the manifest that names it: `spec.phases[1].data[0].uri`."""
    lengths: Lengths
    epochs: int
    batch: ResolvedBatch
    optimizer: ResolvedOptimizer


class RunConfig(ApiModel):
    """The resolved job: presets expanded, defaults filled in, and nothing of pods or secrets. Written as `run.json`."""

    name: str
    seed: int
    model: Model
    phases: list[ResolvedPhase]
    packing: Packing
    """`spec.batch.packing`."""
    validation: Validation | None
    trainer: Compute
    checkpoints: Saving
    prepared_data_uri: str
    hang_timeout_seconds: int = Lifecycle().hang_timeout_seconds
    """`spec.lifecycle.hangTimeoutSeconds`. A run.json of before it was there is read too."""
    loss_guard: float | None = None
    """`spec.lifecycle.lossGuard`."""
