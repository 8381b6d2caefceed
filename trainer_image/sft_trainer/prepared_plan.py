"""What is to be trained, as the status of a job tells it, once the data are prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sft_api.events import PreparedMetrics
from sft_api.status import PhasePlanStatus, PlanStatus
from sft_trainer.schedule import PhaseSteps, Schedule
from sft_trainer.split import PhaseData


def prepared_plan(data: Sequence[PhaseData], schedule: Schedule, prepared: Mapping[str, PreparedMetrics]) -> PlanStatus:
    """`prepared`: what preparation found, by phase. Samples held out are not counted."""
    phases = [
        phase_plan(phase, steps, prepared[steps.name]) for phase, steps in zip(data, schedule.phases, strict=True)
    ]
    return PlanStatus(
        samples=sum(phase.samples for phase in phases), tokens=sum(phase.tokens for phase in phases), phases=phases
    )


def phase_plan(data: PhaseData, steps: PhaseSteps, prepared: PreparedMetrics) -> PhasePlanStatus:
    return PhasePlanStatus(
        name=steps.name,
        samples=len(data.samples),
        tokens=int(data.dataset.lengths[data.samples].sum(dtype=np.int64)),
        steps=steps.total_steps,
        dropped=sum(prepared.dropped.values()),
        truncated=prepared.truncated,
        fingerprint=prepared.fingerprint,
    )
