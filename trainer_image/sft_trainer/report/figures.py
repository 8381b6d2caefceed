"""A history in a few numbers: what the closing summary, the report's head and `-o json` say. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sft_api.events import StepMetrics, ValidationMetrics
from sft_trainer.report.history import History


@dataclass(frozen=True)
class StepFigures:
    """A stretch of steps: a phase, or the whole job. Seconds are those of the steps alone."""

    name: str
    first_step: int
    last_step: int
    first_loss: float
    last_loss: float
    samples: int
    tokens: int
    loss_tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    packing_efficiency: float
    """Mean over the steps, each by its seconds, as all the means here."""
    packing_bound: float


def step_figures(steps: list[StepMetrics], name: str, before: StepMetrics | None = None) -> StepFigures:
    """Figures of `steps`, of which there is at least one; `before` is the last step that does not belong to them."""
    assert steps
    seconds = sum(step.seconds for step in steps)
    first, last = steps[0], steps[-1]
    known = [step for step in steps if step.mfu is not None]
    return StepFigures(
        name=name,
        first_step=first.step,
        last_step=last.step,
        first_loss=first.loss,
        last_loss=last.loss,
        samples=last.samples - (before.samples if before else 0),
        tokens=last.tokens - (before.tokens if before else 0),
        loss_tokens=last.loss_tokens - (before.loss_tokens if before else 0),
        seconds=seconds,
        tokens_per_second=weighted([(step.tokens_per_second, step.seconds) for step in steps]),
        mfu=weighted([(step.mfu or 0.0, step.seconds) for step in known]) if known else None,
        packing_efficiency=weighted([(step.packing_efficiency, step.seconds) for step in steps]),
        packing_bound=weighted([(step.packing_bound, step.seconds) for step in steps]),
    )


def weighted(values: list[tuple[float, float]]) -> float:
    """Mean of (value, weight); plain where no weight is left (steps too quick for the clock)."""
    total = sum(weight for _, weight in values)
    if total <= 0:
        return sum(value for value, _ in values) / len(values)
    return sum(value * weight for value, weight in values) / total


def job_figures(history: History) -> StepFigures | None:
    """The whole job's figures; none before the first step."""
    return step_figures(history.steps, "all") if history.steps else None


def phase_figures(history: History) -> list[StepFigures]:
    """One entry for each phase that took a step, in their order."""
    figures: list[StepFigures] = []
    start = 0
    steps = history.steps
    for end in range(1, len(steps) + 1):
        if end == len(steps) or steps[end].phase != steps[start].phase:
            before = steps[start - 1] if start else None
            figures.append(step_figures(steps[start:end], steps[start].phase, before))
            start = end
    return figures


def validation_change(history: History) -> tuple[ValidationMetrics, ValidationMetrics] | None:
    """The first and the newest scores of the held-out data; none where it was scored less than twice."""
    scored = history.validations
    return (scored[0], scored[-1]) if len(scored) > 1 else None


def restart_steps(history: History) -> list[int]:
    """The steps at which the training was taken up again: the first of each attempt but the job's first."""
    starts = [attempt.first_step for attempt in history.attempts]
    return [step for step in starts if step is not None and step > 1]
