"""What a job will do, before anything is trained and without a GPU: steps, tokens, packing and memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TypedDict

import numpy as np

from sft_api.events import Event, PreparedMetrics
from sft_api.run import ResolvedPhase, RunConfig
from sft_api.spec import Packing, Precision
from sft_trainer.fetch import fetch_model
from sft_trainer.memory import STAGES, memory_need
from sft_trainer.model import ModelNumbers, load_config, model_numbers_of
from sft_trainer.plan import Packer, permutation
from sft_trainer.preparation import cache_folder, prepare_job
from sft_trainer.schedule import PhaseSteps, Schedule
from sft_trainer.split import PhaseData, open_data

PLANNED_STEPS = 500
"""Steps of each phase's first epoch that are planned for the figures on packing; more would change no digit shown."""


class PlannedPhase(TypedDict):
    """One phase of `sft plan -o json`. Token and sample counts are of one epoch, without what is held out."""

    name: str
    samples: int
    tokens: int
    lossTokens: int
    dropped: dict[str, int]
    truncated: int
    epochs: int
    steps: int
    microBatches: int
    utilisation: float
    bound: float


class PlannedMemory(TypedDict):
    stage: dict[str, int]
    """Bytes on each GPU, by ZeRO stage."""
    available: int
    fits: bool
    """Whether the chosen stage fits."""
    chosen: int


class JobPlan(TypedDict):
    resolved: dict[str, object]
    gpus: int
    phases: list[PlannedPhase]
    totalSteps: int
    memory: PlannedMemory


def plan_job(config: RunConfig, gpus: int, gpu_memory: int, report: Callable[[Event], None], processes: int) -> JobPlan:
    """Prepare the data (where the run will find it) and work out the rest from lengths and the model's config.

    Args:
        gpus: ranks to plan for.
        gpu_memory: bytes of each GPU.
    """
    summaries: dict[str, PreparedMetrics] = {}

    def note(event: Event) -> None:
        if isinstance(event, PreparedMetrics):
            summaries[event.phase] = event
        report(event)

    prepared = prepare_job(config, note, processes, lambda folder: load_config(folder, config.model))
    data, _ = open_data(config, prepared)
    schedule = Schedule(config.phases, [len(phase.samples) for phase in data])
    numbers = model_numbers_of(fetch_model(config.model, cache_folder() / "models", weights=False), config.model)
    memory = plan_memory(config, numbers, gpus, gpu_memory)
    padded = config.packing is Packing.PADDED
    packer = Packer(gpus, memory["chosen"] > 1, padded, numbers.quadratic_length)
    phases = [
        plan_phase(config.seed, index, phase, data[index], schedule.phases[index], packer, summaries[phase.name])
        for index, phase in enumerate(config.phases)
    ]
    return JobPlan(
        resolved=config.model_dump(by_alias=True, mode="json"),
        gpus=gpus,
        phases=phases,
        totalSteps=schedule.total_steps,
        memory=memory,
    )


def plan_phase(
    seed: int,
    index: int,
    phase: ResolvedPhase,
    data: PhaseData,
    steps: PhaseSteps,
    packer: Packer,
    summary: PreparedMetrics,
) -> PlannedPhase:
    lengths = data.dataset.lengths[data.samples]
    order = permutation(len(lengths), seed, index, 0)
    starts = range(0, len(order), data.effective_batch_size)
    plans = [
        packer.plan(lengths[order[start : start + data.effective_batch_size]], data.capacity)
        for start in islice(starts, PLANNED_STEPS)
    ]
    spent = sum(plan.span for plan in plans) * packer.ranks
    useful = sum(plan.cost for plan in plans)
    return PlannedPhase(
        name=phase.name,
        samples=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        lossTokens=int(data.dataset.num_loss_tokens[data.samples].sum(dtype=np.int64)),
        dropped=summary.dropped,
        truncated=summary.truncated,
        epochs=phase.epochs,
        steps=steps.total_steps,
        microBatches=max(plan.max_micro_batches for plan in plans),
        utilisation=useful / spent,
        bound=useful / (sum(plan.lower_bound for plan in plans) * packer.ranks),
    )


def plan_memory(config: RunConfig, numbers: ModelNumbers, gpus: int, gpu_memory: int) -> PlannedMemory:
    need = memory_need(
        numbers,
        gpus,
        max(phase.batch.max_tokens_per_gpu for phase in config.phases),
        config.trainer.precision is Precision.BF16,
        config.trainer.activation_checkpointing,
    )
    chosen = config.trainer.zero_stage or need.lowest_that_fits(gpu_memory) or STAGES[-1]
    return PlannedMemory(
        stage={str(stage): need.by_stage[stage] for stage in STAGES},
        available=gpu_memory,
        fits=need.fits(chosen, gpu_memory),
        chosen=chosen,
    )
