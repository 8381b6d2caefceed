"""The last words of `sft run`: how it ended, in figures, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sft_api.run import ExitCode
from sft_trainer.report import History, wording
from sft_trainer.report.figures import StepFigures, job_figures, validation_change

LOG_LINES = 15
LABEL_WIDTH = 20
AGAIN = {ExitCode.PREEMPTED, ExitCode.HUNG, ExitCode.COMMUNICATION, ExitCode.STORE_UNAVAILABLE}
"""Ends after which the same command may well succeed."""


@dataclass(frozen=True)
class Ending:
    """Everything the last words are made of."""

    code: int
    uri: str
    seconds: float
    """Wall time of the whole command."""
    history: History
    exports: list[tuple[str, str]]
    """Phase and place of each exported model, as a person would open it."""
    report: str | None
    log: Path
    """stderr of the trainer."""
    message: str | None


def print_summary(console: Console, ending: Ending) -> None:
    console.print()
    if ending.code == 0:
        console.print(Text.assemble(("✓ ", "bold green"), ("Trained.", "bold")))
    else:
        tell_failure(console, ending)
    for label, value in summary_rows(ending):
        console.print(Text.assemble((f"{label:<{LABEL_WIDTH}}", "dim"), value), soft_wrap=True)
    for line in next_steps(ending):
        console.print(Text(line), soft_wrap=True)


def summary_rows(ending: Ending) -> Iterator[tuple[str, str]]:
    """Label and value of each line; only what this job has."""
    history = ending.history
    figures = job_figures(history)
    if figures is not None:
        yield from training_rows(history, figures)
    yield "time", time_spent(ending, figures)
    if history.checkpoints:
        newest = history.checkpoints[-1]
        more = f" (the newest of {len(history.checkpoints)} committed)" if len(history.checkpoints) > 1 else ""
        yield "checkpoint", f"step {newest.step:,}, {wording.size(newest.bytes)}{more}: sft checkpoints {ending.uri}"
    for phase, place in ending.exports:
        yield "model", f"{place} (after {phase})"
    if ending.report:
        yield "report", ending.report


def time_spent(ending: Ending, figures: StepFigures | None) -> str:
    here = wording.duration(ending.seconds)
    if figures is None:
        return here
    in_steps = wording.duration(figures.seconds)
    if len(ending.history.attempts) > 1:
        return f"{here} this time; {in_steps} in the steps of all attempts"
    return f"{here} in all, {in_steps} in steps"


def training_rows(history: History, figures: StepFigures) -> Iterator[tuple[str, str]]:
    yield "loss", f"{wording.number(figures.first_loss)} → {wording.number(figures.last_loss)}"
    if change := validation_change(history):
        before, after = change
        yield "held-out loss", f"{wording.number(before.loss)} → {wording.number(after.loss)}"
        yield "held-out accuracy", f"{wording.percent(before.accuracy)} → {wording.percent(after.accuracy)}"
    total = history.total_steps
    again = f", {history.steps_lost:,} taken again after restarts" if history.steps_lost else ""
    yield "steps", f"{figures.last_step:,}" + (f" of {total:,}" if total else "") + again
    yield (
        "trained on",
        f"{figures.samples:,} samples, {wording.short_count(figures.tokens)} tokens,"
        f" {wording.short_count(figures.loss_tokens)} with loss",
    )
    yield "throughput", f"{wording.count(figures.tokens_per_second)} tokens/s, no padding counted"
    if figures.mfu is not None:
        yield "MFU", wording.percent(figures.mfu)
    reached, bound = wording.percent(figures.packing_efficiency), wording.percent(figures.packing_bound)
    yield "packing", f"{reached} of what the ranks wait for; {bound} is the best any plan could reach"


def tell_failure(console: Console, ending: Ending) -> None:
    """Why it ended, and the end of the trainer's log where the reason is not one that a user can act on."""
    stopped = ending.code == ExitCode.PREEMPTED
    words = "Stopped" if stopped else f"Ended with exit code {ending.code}"
    style = "bold yellow" if stopped else "bold red"
    reason = f": {wording.visible(ending.message)}" if ending.message else "."
    console.print(Text.assemble(("■ " if stopped else "✗ ", style), (words, style), reason), soft_wrap=True)
    tail = log_tail(ending.log)
    if stopped or not tail:
        return
    console.print(Text(f"The last lines of the trainer's log, {ending.log}:", style="dim"), soft_wrap=True)
    for line in tail:
        console.print(Text(f"  {wording.visible(line)}", style="dim"), soft_wrap=True)


def log_tail(log: Path) -> list[str]:
    """The log's last lines; of a progress bar that draws over itself, what it drew last."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return [kept for line in lines if (kept := line.rstrip("\r").rpartition("\r")[2].rstrip())][-LOG_LINES:]


def next_steps(ending: Ending) -> Iterator[str]:
    """What to type next."""
    committed = bool(ending.history.checkpoints)
    if ending.code == 0:
        return
    if ending.code in AGAIN or ending.code > 33 or ending.code < 10:
        place = f"goes on after step {ending.history.checkpoints[-1].step:,}" if committed else "begins anew"
        yield f"Run the same command again: it {place}."
    elif committed:
        step = ending.history.checkpoints[-1].step
        yield f"Nothing that was committed is lost: once this is mended, the same command goes on after step {step:,}."
