"""The plots' numbers, packed for the page: columns of base64 Float32, thinned where they are too many."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence

from sft_api.events import StepMetrics
from sft_trainer.report.figures import phase_figures, restart_steps
from sft_trainer.report.history import History

MAX_POINTS = 20_000
"""More steps than this are thinned; below it the browser draws every one (10,000 take a third of a second)."""


def payload(history: History) -> dict[str, object]:
    """What the page's script draws, as JSON-able values."""
    steps = thinned(history.steps, MAX_POINTS)
    columns: dict[str, Sequence[float]] = {
        "step": [step.step for step in steps],
        "loss": [step.loss for step in steps],
        "gradNorm": [step.grad_norm for step in steps],
        "learningRate": [step.learning_rate for step in steps],
        "tokensPerSecond": [step.tokens_per_second for step in steps],
        "efficiency": [step.packing_efficiency for step in steps],
        "bound": [step.packing_bound for step in steps],
    }
    scored = history.validations
    return {
        "columns": {name: packed(values) for name, values in columns.items()},
        "validation": {
            "step": [event.step for event in scored],
            "loss": packed([event.loss for event in scored]),
            "accuracy": packed([event.accuracy for event in scored]),
        },
        "phases": [
            {"name": figures.name, "first": figures.first_step, "last": figures.last_step}
            for figures in phase_figures(history)
        ],
        "checkpoints": [event.step for event in history.checkpoints],
        "restarts": restart_steps(history),
    }


def packed(values: Sequence[float]) -> str:
    """Little-endian Float32 in base64; NaN and infinity survive, which JSON could not carry."""
    floats = array("f", values)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode("ascii")


def thinned(steps: Sequence[StepMetrics], limit: int) -> list[StepMetrics]:
    """At most `limit` of the steps, both ends and every stretch's extremes of loss and gradient norm among them."""
    if len(steps) <= limit:
        return list(steps)
    width = -(-len(steps) * 4 // (limit - 2))
    chosen = {0, len(steps) - 1}
    for start in range(0, len(steps), width):
        stretch = range(start, min(start + width, len(steps)))
        chosen.add(stretch[0])
        chosen.add(min(stretch, key=lambda index: steps[index].loss))
        chosen.add(max(stretch, key=lambda index: steps[index].loss))
        chosen.add(max(stretch, key=lambda index: steps[index].grad_norm))
    return [steps[index] for index in sorted(chosen)]
