"""What a job has left in its store: its history merged from all attempts, and the HTML report made from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sft_api import names
from sft_api.events import Event, PreparedMetrics, StepMetrics
from sft_api.run import RunConfig
from sft_trainer.report import History, ReportData, merge, read_attempts, read_prepared, render

if TYPE_CHECKING:
    from sft_trainer.store import Store


@dataclass(frozen=True)
class Spoken:
    """What this process heard from the attempt it watched; the store may not have its last lines."""

    attempt: int
    events: Sequence[Event]
    prepared: Sequence[PreparedMetrics]


def read_history(store: Store, warn: Callable[[str], None], spoken: Spoken | None = None) -> History:
    """The job's history as the store tells it. Raises RunError where the store cannot be read."""
    attempts = read_attempts(store, warn)
    if spoken is not None:
        attempts[spoken.attempt] = completed(attempts.get(spoken.attempt, []), spoken.events)
    prepared = spoken.prepared if spoken else ()
    history = merge(attempts, prepared)
    return history if history.prepared else merge(attempts, read_prepared(store, history.started))


def completed(stored: Sequence[Event], heard: Sequence[Event]) -> list[Event]:
    """An attempt from two tellings: steps from both, each once and in order; everything else as it was heard."""
    steps = {event.step: event for event in [*stored, *heard] if isinstance(event, StepMetrics)}
    others = [event for event in heard if not isinstance(event, StepMetrics)]
    return [*others, *(steps[number] for number in sorted(steps))]


def report_page(history: History, name: str, uri: str, config: RunConfig | None) -> str:
    data = ReportData(name=name, uri=uri, history=history, generated=datetime.now(UTC), config=config)
    return render(data)


def put_report(store: Store, page: str) -> str:
    """Write the report into the store; returns where a person finds it."""
    store.put(names.REPORT, page.encode())
    return shown(store, names.REPORT)


def shown(store: Store, key: str) -> str:
    """A local path, from here if it lies below, or the URI of an object elsewhere."""
    path = store.local_path(key)
    return short_path(path) if path is not None else f"{store.uri.rstrip('/')}/{key}"


def short_path(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
