"""How a run is shown: as JSON lines for a program, as plain lines for a log. The terminal's display is `live`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from sft_api.events import Event, Finished, PreparedMetrics, PrepareProgress, StepMetrics
from sft_cli.samples import chosen_samples, marked
from sft_cli.session import Session
from sft_trainer.report import wording
from sft_trainer.voice import sentence

PLAIN_SECONDS = 5.0
"""Least time between two lines of the same kind where nobody watches."""


class Display(Protocol):
    """Shows a run as it goes on. `session` has taken an event before the display is shown it."""

    def note(self, text: str) -> None:
        """Something that `sft` itself has to say."""

    def event(self, event: Event, line: str) -> None:
        """An event, and the line it came in."""

    def stage(self, name: str) -> None:
        """A stage begins: `prepare` or `train`."""

    def close(self) -> None:
        """The run is over, however it ended."""


class JsonDisplay:
    """The trainer's lines as they are on stdout and nothing else; notes go to stderr."""

    def __init__(self, out: TextIO, errors: TextIO):
        self._out, self._errors = out, errors

    def note(self, text: str) -> None:
        print(text, file=self._errors, flush=True)

    def event(self, event: Event, line: str) -> None:
        print(line, file=self._out, flush=True)

    def stage(self, name: str) -> None:
        return

    def close(self) -> None:
        return


class PlainDisplay:
    """Sentences for a log: every notable event, and of steps and progress one every few seconds."""

    def __init__(self, out: TextIO, session: Session, clock: Callable[[], float] = time.monotonic):
        self._out, self._session, self._clock = out, session, clock
        self._due: dict[str, float] = {}

    def note(self, text: str) -> None:
        print(wording.visible(text), file=self._out, flush=True)

    def event(self, event: Event, line: str) -> None:
        if isinstance(event, StepMetrics):
            if self._is_due("step") or self._is_last(event):
                self.note(self._step(event))
        elif isinstance(event, PrepareProgress):
            if self._is_due(event.phase):
                self.note(sentence(event))
        elif not isinstance(event, Finished):  # the closing summary says it
            self.note(sentence(event))

    def stage(self, name: str) -> None:
        if name == "train":
            self._show_samples()
            self.note("starting the trainer")

    def close(self) -> None:
        return

    def _is_due(self, kind: str) -> bool:
        now = self._clock()
        if now < self._due.get(kind, now):
            return False
        self._due[kind] = now + PLAIN_SECONDS
        return True

    def _is_last(self, step: StepMetrics) -> bool:
        started = self._session.started
        return started is not None and step.step == started.total_steps

    def _step(self, step: StepMetrics) -> str:
        started, left = self._session.started, self._session.seconds_left()
        of = f"/{started.total_steps}" if started else ""
        eta = f" · {wording.duration(left)} left" if left else ""
        return (
            f"step {step.step}{of} · {step.phase} epoch {step.epoch} · loss {wording.number(step.loss)}"
            f" · gradient norm {wording.number(step.grad_norm)} · learning rate {wording.rate(step.learning_rate)}"
            f" · {wording.count(step.tokens_per_second)} tokens/s"
            f" · packing {wording.percent(step.packing_efficiency)} of {wording.percent(step.packing_bound)}{eta}"
        )

    def _show_samples(self) -> None:
        prepared: list[PreparedMetrics] = list(self._session.prepared.values())
        for phase, sample in chosen_samples(prepared):
            self.note(f"a sample of {phase}; the text in ⟦ ⟧ is trained on:")
            self.note("\n".join(f"    {line}" for line in marked(sample).splitlines()))
