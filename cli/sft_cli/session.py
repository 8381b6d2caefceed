"""What a run has said so far: the events of its two stages, gathered for the display and the closing summary."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sft_api.events import (
    CheckpointCommitted,
    Event,
    Exported,
    Finished,
    PreparedMetrics,
    PrepareProgress,
    Started,
    StepMetrics,
    ValidationMetrics,
)

RECENT_STEPS = 2_000
"""Steps kept at hand; all of them are in the store."""
PACE_STEPS = 50
"""Steps over which the pace is taken for the time that is left."""


@dataclass
class Session:
    """The state of one `sft run`, moved on by each event."""

    prepared: dict[str, PreparedMetrics] = field(default_factory=dict)
    preparing: dict[str, PrepareProgress] = field(default_factory=dict)
    started: Started | None = None
    steps: deque[StepMetrics] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    validations: list[ValidationMetrics] = field(default_factory=list)
    checkpoints: list[CheckpointCommitted] = field(default_factory=list)
    exports: list[Exported] = field(default_factory=list)
    finished: Finished | None = None
    others: list[Event] = field(default_factory=list)
    """Every event of the training but its steps, in order."""

    @property
    def newest(self) -> StepMetrics | None:
        return self.steps[-1] if self.steps else None

    def take(self, event: Event) -> None:
        match event:
            case PrepareProgress():
                self.preparing[event.phase] = event
                return
            case PreparedMetrics():
                self.preparing.pop(event.phase, None)
                self.prepared[event.phase] = event
                return
            case StepMetrics():
                self.steps.append(event)
                return
            case Finished() if self.started is None and event.exit_code == 0:
                return  # the end of the preparation, not of the run
            case Started():
                self.started = event
            case ValidationMetrics():
                self.validations.append(event)
            case CheckpointCommitted():
                self.checkpoints.append(event)
            case Exported():
                self.exports.append(event)
            case Finished():
                self.finished = event
        self.others.append(event)

    def training_events(self) -> list[Event]:
        """What the training said, as far as it is at hand."""
        return [*self.others, *self.steps]

    def seconds_left(self) -> float | None:
        """Time to the last step at the recent pace, saves and scoring counted; none before the second step."""
        if self.started is None or len(self.steps) < 2:
            return None
        recent = list(self.steps)[-PACE_STEPS:]
        pace = (recent[-1].time - recent[0].time) / (len(recent) - 1)
        return max(0.0, pace * (self.started.total_steps - recent[-1].step))

    def phase_position(self, phase: str) -> tuple[int, int, int] | None:
        """(1-based index, number of phases, epochs of this phase); none where the plan does not know it."""
        plans = self.started.phases if self.started else []
        for index, plan in enumerate(plans, start=1):
            if plan.name == phase:
                return index, len(plans), plan.epochs
        return None
