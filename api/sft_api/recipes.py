"""The recipes of the paper's Table 1, and how a job becomes the RunConfig its trainer obeys. Pure.

Source: "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs", ICLR 2025, arXiv 2412.13337.
Where a recipe is silent, the defaults follow the paper's advice: a constant learning rate and no warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from sft_api import names
from sft_api.job import SFTJob
from sft_api.run import Lengths, ResolvedBatch, ResolvedOptimizer, ResolvedPhase, RunConfig
from sft_api.spec import (
    BatchOverrides,
    Compute,
    DataSource,
    LearningRateSchedule,
    OptimizerOverrides,
    OptimizerState,
    Overlong,
    Phase,
    PhaseOptimizerOverrides,
    Recipe,
    Saving,
    Strategy,
    Warmup,
)

Overrides = TypeVar("Overrides", BatchOverrides, OptimizerOverrides)
Part = TypeVar("Part", Compute, Saving)

MAX_SEQUENCE_LENGTH = 4096
MAX_TOKENS_PER_GPU = 16384
"""Capacity of a micro-batch where the job names none. Several samples fill it, which packing needs; with activation
checkpointing it costs an 8B model about 5 GB a GPU."""
BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.0
MAX_GRAD_NORM = 1.0

NO_WARMUP = Warmup(steps=0)


@dataclass(frozen=True)
class Preset:
    """What a recipe fills in. None: the job has to say it."""

    effective_batch_size: int | None = None
    learning_rate: float | None = None
    epochs: int | None = None
    warmup: Warmup = NO_WARMUP
    schedule: LearningRateSchedule = LearningRateSchedule.CONSTANT


PRESETS: dict[Recipe, Preset] = {
    Recipe.LAB: Preset(3840, 2e-5, 10, Warmup(steps=25)),
    Recipe.TULU: Preset(128, 2e-5, 3, Warmup(ratio=0.03), LearningRateSchedule.LINEAR),
    # The table's schedule cell of TULU++ reads "no decay".
    Recipe.TULU_PLUS_PLUS: Preset(128, 3e-5, 4, Warmup(ratio=0.03)),
    Recipe.NONE: Preset(),
}


def resolve(job: SFTJob) -> RunConfig:
    """The job with its preset expanded, its defaults filled in and its strategy turned into phases.

    `job` comes from `sft_api.manifest.parse_job`, which refuses what cannot be resolved.
    """
    spec = job.spec
    return RunConfig(
        name=job.metadata.name,
        seed=spec.seed,
        model=spec.model,
        phases=resolve_phases(job),
        packing=spec.batch.packing,
        validation=spec.validation,
        trainer=part(spec.trainer, Compute),
        checkpoints=part(spec.checkpoints, Saving),
        prepared_data_uri=names.without_slash(spec.prepared_data.uri)
        if spec.prepared_data
        else names.prepared_data_uri(spec.checkpoints.uri),
        hang_timeout_seconds=spec.lifecycle.hang_timeout_seconds,
        loss_guard=spec.lifecycle.loss_guard,
    )


def part(whole: Part, kind: type[Part]) -> Part:
    """The fields of `kind` alone, of a `whole` that has more."""
    return kind(**{name: getattr(whole, name) for name in kind.model_fields})


def resolve_phases(job: SFTJob) -> list[ResolvedPhase]:
    """Phased: the phases as given. Stacked: one phase of all data. ByLength: all data twice, shorter half first."""
    match job.spec.strategy:
        case Strategy.PHASED:
            return [
                resolve_phase(job, phase.name, {index: phase}, phase) for index, phase in enumerate(job.spec.phases)
            ]
        case Strategy.STACKED:
            return [resolve_phase(job, "stacked", dict(enumerate(job.spec.phases)))]
        case Strategy.BY_LENGTH:
            everything = dict(enumerate(job.spec.phases))
            halves = {"shorter": Lengths.SHORTER, "longer": Lengths.LONGER}
            return [resolve_phase(job, name, everything, lengths=half) for name, half in halves.items()]


def resolve_phase(
    job: SFTJob, name: str, sources: dict[int, Phase], own: Phase | None = None, lengths: Lengths = Lengths.ALL
) -> ResolvedPhase:
    """A phase over the data of `sources` (by their index in spec.phases); `own` overrides the job's settings."""
    preset = PRESETS[job.spec.recipe]
    epochs = (own.epochs if own else None) or job.spec.epochs or preset.epochs
    assert epochs is not None, "parse_job lets no job without epochs through"
    return ResolvedPhase(
        name=name,
        data=[source for phase in sources.values() for source in phase.data],
        data_paths=[path for index, phase in sources.items() for path in data_paths(index, phase.data)],
        lengths=lengths,
        epochs=epochs,
        batch=resolve_batch(preset, job.spec.batch, own.batch if own else None),
        optimizer=resolve_optimizer(preset, job.spec.optimizer, own.optimizer if own else None),
    )


def data_paths(index: int, data: list[DataSource]) -> list[str]:
    return [f"spec.phases[{index}].data[{number}].uri" for number in range(len(data))]


def resolve_batch(preset: Preset, job: BatchOverrides, phase: BatchOverrides | None) -> ResolvedBatch:
    merged = override(job, phase)
    size = merged.effective_batch_size or preset.effective_batch_size
    assert size is not None, "parse_job lets no job without effectiveBatchSize through"
    length = merged.max_sequence_length or MAX_SEQUENCE_LENGTH
    return ResolvedBatch(
        effective_batch_size=size,
        max_tokens_per_gpu=merged.max_tokens_per_gpu or max(length, MAX_TOKENS_PER_GPU),
        max_sequence_length=length,
        overlong=merged.overlong or Overlong.TRUNCATE,
    )


def resolve_optimizer(
    preset: Preset, job: OptimizerOverrides, phase: PhaseOptimizerOverrides | None
) -> ResolvedOptimizer:
    merged = override(job, phase)
    rate = merged.learning_rate or preset.learning_rate
    assert rate is not None, "parse_job lets no job without learningRate through"
    return ResolvedOptimizer(
        learning_rate=rate,
        schedule=merged.schedule or preset.schedule,
        warmup=merged.warmup or preset.warmup,
        betas=(merged.betas[0], merged.betas[1]) if merged.betas else BETAS,
        eps=merged.eps or EPS,
        weight_decay=WEIGHT_DECAY if merged.weight_decay is None else merged.weight_decay,
        max_grad_norm=merged.max_grad_norm or MAX_GRAD_NORM,
        state=phase.state if phase else OptimizerState.KEEP,
    )


def override(job: Overrides, phase: Overrides | None) -> Overrides:
    """The job's settings with those that the phase gives in their place."""
    if phase is None:
        return job
    given = {name: value for name in type(job).model_fields if (value := getattr(phase, name, None)) is not None}
    return job.model_copy(update=given)
