"""How the gang is doing, as `TrainerReport`: made from its events, answered to `/progress`, kept for the launcher.

The launcher reads the file when the ranks have ended, whatever ended them.
"""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime
from pathlib import Path

from sft_api.events import CheckpointCommitted, Event, Exported, PhasePlan, Started, StepMetrics
from sft_api.report import TrainerReport
from sft_api.status import CheckpointStatus, ExportStatus, PhaseStatus, Progress

PROBLEM_LENGTH = 1024
"""Of a checkpoint's problem, as it is reported: status and termination message have little room."""


def utc(seconds: float) -> datetime:
    """Unix time as Kubernetes writes it: UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC)


def report_file(work: Path) -> Path:
    return work / "report.json"


def read_report(work: Path) -> TrainerReport | None:
    """What the first rank last knew; none where it is not on this machine, or knew nothing yet."""
    path = report_file(work)
    return TrainerReport.model_validate_json(path.read_text()) if path.exists() else None


class Reporter:
    """Keeps the report current. Events come from the training thread and from that of the checkpoints."""

    def __init__(self, attempt: int, work: Path):
        self.report = TrainerReport(attempt=attempt)
        self._file = report_file(work)
        self._changing = threading.Lock()
        self._phases: list[PhasePlan] = []
        self._total_steps = 0
        self._first: tuple[float, int] | None = None
        self.know()

    def know(self, **facts: object) -> None:
        """Take over fields of the report."""
        with self._changing:
            self.report = self.report.model_copy(update=facts)
            self._keep()

    def observe(self, event: Event) -> None:
        match event:
            case Started():
                self._phases, self._total_steps = event.phases, event.total_steps
                self.know(resumed_from_step=event.resumed_from_step)
            case StepMetrics():
                seconds = self.report.productive_seconds + event.seconds
                self.know(phase=self.phase(event.phase), progress=self._progress(event), productive_seconds=seconds)
            case CheckpointCommitted():
                # The commit comes after every rank has read back what it wrote.
                checkpoint = CheckpointStatus(
                    uri=event.uri, step=event.step, phase=event.phase, time=utc(event.time), verified=True
                )
                self.know(checkpoint=checkpoint, checkpoint_problem=None)
            case Exported():
                self.know(export=ExportStatus(uri=event.uri))

    def phase(self, name: str) -> PhaseStatus:
        index = next(index for index, phase in enumerate(self._phases) if phase.name == name)
        return PhaseStatus(name=name, index=index, count=len(self._phases))

    def _progress(self, metrics: StepMetrics) -> Progress:
        self._first = self._first or (metrics.time - metrics.seconds, metrics.step - 1)
        rate = (metrics.time - self._first[0]) / (metrics.step - self._first[1])
        return Progress(
            step=metrics.step,
            total_steps=self._total_steps,
            epoch=metrics.epoch,
            samples=metrics.samples,
            tokens=metrics.tokens,
            percent=percent(metrics.step, self._total_steps),
            eta_seconds=max(0, round(rate * (self._total_steps - metrics.step))),
            loss=legible(metrics.loss),
            grad_norm=legible(metrics.grad_norm),
            learning_rate=legible(metrics.learning_rate),
            tokens_per_second=legible(metrics.tokens_per_second),
            mfu=metrics.mfu and legible(metrics.mfu),
            packing_efficiency=legible(metrics.packing_efficiency),
            heartbeat=utc(metrics.time),
        )

    def _keep(self) -> None:
        partial = self._file.with_name(f".{self._file.name}")
        with contextlib.suppress(OSError):  # a full disk ends no training; the file is then that of an earlier step
            partial.write_text(self.report.model_dump_json(by_alias=True))
            partial.rename(self._file)


def legible(figure: float) -> float:
    """With five digits, for a column of `kubectl get`. The metrics have them all."""
    return float(f"{figure:.5g}")


def percent(step: int, total_steps: int) -> int:
    """Steps done of all steps, in percent, rounded down."""
    return 100 * step // total_steps
