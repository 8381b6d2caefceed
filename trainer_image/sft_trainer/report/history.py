"""What a job did, told once: the events of its attempts merged into one history. Knows no HTML and no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ValidationError

from sft_api import names
from sft_api.events import (
    EVENT,
    CheckpointCommitted,
    Event,
    Exported,
    Finished,
    Message,
    PreparedMetrics,
    Started,
    StepMetrics,
    ValidationMetrics,
)

if TYPE_CHECKING:
    from sft_trainer.store import Store


@dataclass(frozen=True)
class Attempt:
    """One start of the trainer, from its first step to its end."""

    number: int
    first_step: int | None
    last_step: int | None
    steps_lost: int
    """Steps of this attempt that a later one had to take again."""
    seconds: float
    """Wall time from the first step's start to the last step's end."""
    started: Started | None = None
    finished: Finished | None = None


@dataclass
class History:
    """The job's path from its first step to its newest, without what was done in vain."""

    steps: list[StepMetrics] = field(default_factory=list)
    validations: list[ValidationMetrics] = field(default_factory=list)
    checkpoints: list[CheckpointCommitted] = field(default_factory=list)
    exports: list[Exported] = field(default_factory=list)
    prepared: list[PreparedMetrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def started(self) -> Started | None:
        return next((attempt.started for attempt in reversed(self.attempts) if attempt.started), None)

    @property
    def finished(self) -> Finished | None:
        return self.attempts[-1].finished if self.attempts else None

    @property
    def total_steps(self) -> int | None:
        return self.started.total_steps if self.started else None

    @property
    def steps_lost(self) -> int:
        return sum(attempt.steps_lost for attempt in self.attempts)


def read_attempts(store: Store, warn: Callable[[str], None]) -> dict[int, list[Event]]:
    """The events of each attempt, from the store. A line that cannot be read is told to `warn`."""
    numbers = {names.parse_metrics(info.key) for info in store.list(names.METRICS)}
    numbers |= {names.parse_attempt(info.key) for info in store.list(names.ATTEMPTS)}
    attempts: dict[int, list[Event]] = {}
    for number in sorted(number for number in numbers if number is not None):
        attempts[number] = []
        for key in (names.events(number), names.metrics(number)):
            if store.head(key) is not None:
                attempts[number] += parse_lines(store.get(key), f"{store.uri}/{key}", warn)
    return attempts


def read_prepared(store: Store, started: Started | None) -> list[PreparedMetrics]:
    """What the job's data holds, as its preparation noted it in the store; nothing where it noted none."""
    if store.head(names.PREPARED) is None:
        return []
    from sft_trainer.prepare import PreparedJob  # loads pyarrow: only where there is something to read

    job = PreparedJob.model_validate_json(store.get(names.PREPARED))
    phases = [plan.name for plan in started.phases] if started else []
    named = dict(
        zip(phases or [f"phase {number}" for number in range(1, len(job.phases) + 1)], job.phases, strict=False)
    )
    if job.validation is not None:
        named["validation"] = job.validation
    return [
        PreparedMetrics(
            phase=name,
            reused=True,
            seconds=0.0,
            **job.summaries[fingerprint].model_dump(include=SUMMARY_FIELDS),
        )
        for name, fingerprint in named.items()
    ]


SUMMARY_FIELDS = {"fingerprint", "samples", "tokens", "loss_tokens", "dropped", "truncated", "preview"}


def parse_lines(data: bytes, name: str, warn: Callable[[str], None]) -> list[Event]:
    """Events of a JSONL file, in its order. A last line without an end was cut off while being written: passed over."""
    events: list[Event] = []
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            events.append(EVENT.validate_json(line))
        except ValidationError as error:
            if number < len(lines) or line.endswith(b"\n"):
                warn(f"{name}, line {number} is passed over: {error.errors()[0]['msg']}")
    return events


def merge(attempts: Mapping[int, Sequence[Event]], prepared: Iterable[PreparedMetrics] = ()) -> History:
    """One history from all attempts: a later attempt replaces whatever earlier ones did from its first step on."""
    history = History()
    kept: list[tuple[int, Sequence[Event], int]] = []
    for number, events in sorted(attempts.items()):
        lost_from = first_step(events)
        if lost_from is not None:
            kept = [(earlier, old, min(end, lost_from)) for earlier, old, end in kept]
        kept.append((number, events, NO_STEP))
    phases: dict[str, PreparedMetrics] = {}
    validations: dict[int, ValidationMetrics] = {}
    for number, events, end in kept:
        history.attempts.append(summed_up(number, events, end))
        for event in events:
            take(history, event, end, validations, phases)
    phases |= {event.phase: event for event in prepared}
    history.prepared = list(phases.values())
    history.validations = [validations[step] for step in sorted(validations)]
    return history


NO_STEP = 1 << 62


def first_step(events: Sequence[Event]) -> int | None:
    return next((event.step for event in events if isinstance(event, StepMetrics)), None)


def take(
    history: History,
    event: Event,
    end: int,
    validations: dict[int, ValidationMetrics],
    phases: dict[str, PreparedMetrics],
) -> None:
    """Add the event unless it belongs to a step from `end` on, which a later attempt took again."""
    match event:
        case StepMetrics() if event.step < end:
            history.steps.append(event)
        case ValidationMetrics() if event.step < end:
            validations[event.step] = event
        case CheckpointCommitted() if event.step < end:
            history.checkpoints.append(event)
        case Exported() if event.step < end:
            history.exports.append(event)
        case PreparedMetrics():
            phases[event.phase] = event
        case Message() if event.level != "info":
            history.warnings.append(event.text)
        case _:
            return


def summed_up(number: int, events: Sequence[Event], end: int) -> Attempt:
    steps = [event for event in events if isinstance(event, StepMetrics)]
    return Attempt(
        number=number,
        first_step=steps[0].step if steps else None,
        last_step=steps[-1].step if steps else None,
        steps_lost=sum(event.step >= end for event in steps),
        seconds=steps[-1].time - steps[0].time + steps[0].seconds if steps else 0.0,
        started=next((event for event in events if isinstance(event, Started)), None),
        finished=next((event for event in reversed(events) if isinstance(event, Finished)), None),
    )
