"""A run in a terminal: what has happened scrolls by, what is happening stays below it and is drawn anew."""

from __future__ import annotations

import time
from itertools import pairwise

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sft_api.events import (
    CheckpointCommitted,
    Event,
    Exported,
    Message,
    PreparedMetrics,
    PrepareProgress,
    PreviewMessage,
    Started,
    StepMetrics,
    ValidationMetrics,
)
from sft_cli.samples import chosen_samples, shortened
from sft_cli.session import Session
from sft_trainer.report import wording

REFRESHES_PER_SECOND = 4
SPARKS = "▁▂▃▄▅▆▇█"
LEVEL_STYLES = {"info": "", "warning": "yellow", "error": "bold red"}


class LiveDisplay:
    """Draws with rich: notable events above, and below them the preparation's bars or the newest step."""

    def __init__(self, console: Console, session: Session):
        self._console, self._session = console, session
        self._stage = ""
        self._began = time.monotonic()
        self._committed_at: float | None = None
        self._live = Live(
            console=console,
            get_renderable=self._picture,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def note(self, text: str) -> None:
        self._console.print(Text(wording.visible(text), style="bold"))

    def stage(self, name: str) -> None:
        if name == "train" and self._session.prepared:
            self._console.print(data_table(list(self._session.prepared.values())))
            for phase, sample in chosen_samples(list(self._session.prepared.values())):
                self._console.print(sample_panel(phase, sample))
        self._stage, self._began = name, time.monotonic()

    def event(self, event: Event, line: str) -> None:
        if isinstance(event, CheckpointCommitted):
            self._committed_at = time.monotonic()
        told = told_event(event)
        if told is not None:
            self._console.print(told)
            self._live.refresh()

    def close(self) -> None:
        self._stage = ""
        self._live.stop()

    def _picture(self) -> RenderableType:
        if self._stage == "prepare":
            return preparing(list(self._session.preparing.values()), self._elapsed())
        if self._stage == "train":
            if self._session.newest is None:
                return Spinner("dots", Text(f" loading the model and the data · {self._elapsed()}", style="dim"))
            return self._training()
        return Text("")

    def _elapsed(self) -> str:
        return clock(time.monotonic() - self._began)

    def _training(self) -> RenderableType:
        newest, started = self._session.newest, self._session.started
        assert newest is not None
        total = started.total_steps if started else newest.step
        left = self._session.seconds_left()
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text(self._position(newest), style="bold"),
            ProgressBar(total=total, completed=newest.step),
            Text(f"{newest.step:,}/{total:,} · {newest.step / total:.0%} · {clock(left)} left"),
        )
        return Group(Text(""), bar, figures(newest), self._trail())

    def _position(self, newest: StepMetrics) -> str:
        place = self._session.phase_position(newest.phase)
        if place is None:
            return f"{newest.phase} · epoch {newest.epoch}"
        index, count, epochs = place
        of = f" ({index}/{count})" if count > 1 else ""
        return f"{newest.phase}{of} · epoch {newest.epoch}/{epochs}"

    def _trail(self) -> Text:
        width = max(10, min(60, self._console.width - 60))
        trail = Text("loss ", style="dim", no_wrap=True, overflow="crop")
        trail.append(sparkline([step.loss for step in self._session.steps], width), style="cyan")
        committed = self._session.checkpoints
        saved = "no checkpoint yet"
        if committed and self._committed_at is not None:
            saved = f"checkpoint of step {committed[-1].step:,}, {clock(time.monotonic() - self._committed_at)} ago"
        trail.append(f"   {saved} · running {self._elapsed()}", style="dim")
        return trail


def clock(seconds: float | None) -> str:
    """0:03:12, or –:–– where it is not known."""
    if seconds is None:
        return "–:––"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def sparkline(values: list[float], width: int) -> str:
    """The values as `width` bars at most, each the mean of its share of them; gaps where a value is no number."""
    known = [value for value in values if value == value and abs(value) != float("inf")]
    if not known:
        return ""
    count = min(width, len(known))
    edges = [index * len(known) // count for index in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def preparing(progress: list[PrepareProgress], elapsed: str) -> RenderableType:
    if not progress:
        return Spinner("dots", Text(f" reading the data · {elapsed}", style="dim"))
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(no_wrap=True)
    rows.add_column(ratio=1)
    rows.add_column(no_wrap=True, justify="right")
    for event in progress:
        done = event.fraction
        bar = ProgressBar(total=1.0, completed=done or 0.0, pulse=done is None)
        share = "" if done is None else f" · {done:.0%}"
        rows.add_row(Text(f"preparing {event.phase}", style="bold"), bar, f"{event.samples:,} samples{share}")
    return rows


def figures(step: StepMetrics) -> Text:
    """The newest step's numbers in one line; what does not fit in the terminal is cut off at the end."""
    parts = [
        ("loss ", wording.number(step.loss)),
        ("grad norm ", wording.number(step.grad_norm)),
        ("lr ", wording.rate(step.learning_rate)),
        ("", f"{wording.short_count(step.tokens_per_second)} tokens/s"),
        ("packing ", f"{wording.percent(step.packing_efficiency)} of {wording.percent(step.packing_bound)}"),
    ]
    if step.mfu is not None:
        parts.append(("MFU ", wording.percent(step.mfu)))
    line = Text(no_wrap=True, overflow="ellipsis")
    for index, (label, value) in enumerate(parts):
        line.append("   " if index else "")
        line.append(label, style="dim")
        line.append(value, style="bold" if index == 0 else "")
    return line


def told_event(event: Event) -> RenderableType | None:
    """What is said above the live part of a notable event; none for a step and for progress."""
    match event:
        case PreparedMetrics():
            verb = "found prepared" if event.reused else f"prepared in {wording.duration(event.seconds)}"
            return tick(f"{event.phase}: {event.samples:,} samples, {wording.short_count(event.tokens)} tokens, {verb}")
        case Started():
            return tick(started_line(event))
        case ValidationMetrics():
            return tick(
                f"step {event.step:,}: held-out loss {wording.number(event.loss)},"
                f" accuracy {wording.percent(event.accuracy)}",
                "◆",
                "cyan",
            )
        case CheckpointCommitted():
            return tick(
                f"step {event.step:,}: checkpoint committed, {wording.size(event.bytes)} in"
                f" {wording.duration(event.seconds)}, training stood still {wording.duration(event.stall_seconds)}"
            )
        case Exported():
            return tick(f"step {event.step:,}: model exported to {event.uri}")
        case Message():
            return Text(wording.visible(event.text), style=LEVEL_STYLES[event.level])
    return None  # and of the end: the closing summary says it


def started_line(event: Started) -> str:
    resumed = f", going on after step {event.resumed_from_step:,}" if event.resumed_from_step else ""
    return (
        f"training {wording.short_count(event.parameters)} parameters for {event.total_steps:,} steps{resumed}:"
        f" {event.world_size} × {event.device}, ZeRO {event.zero_stage}, {event.precision}, {event.packing.lower()},"
        f" attention {event.attention} ({event.attention_reason})"
    )


def tick(text: str, sign: str = "✓", style: str = "green") -> Text:
    return Text.assemble((f"{sign} ", style), wording.visible(text))


def data_table(prepared: list[PreparedMetrics]) -> RenderableType:
    """What there is to train on, and what was left out and why."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("data", no_wrap=True)
    for name in ("samples", "tokens", "trained on"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("dropped")
    table.add_column("truncated", justify="right")
    for event in prepared:
        reasons = "\n".join(f"{number:,} {reason}" for reason, number in event.dropped.items())
        table.add_row(
            Text(event.phase),
            f"{event.samples:,}",
            wording.short_count(event.tokens),
            wording.short_count(event.loss_tokens),
            Text(reasons, style="yellow") if reasons else Text("none", style="dim"),
            Text(f"{event.truncated:,}", style="yellow" if event.truncated else "dim"),
        )
    return table


def sample_panel(phase: str, sample: list[PreviewMessage]) -> RenderableType:
    text = Text()
    for piece in shortened(sample):
        text.append(wording.visible(piece.text), style="green" if piece.trained else "dim")
    text.rstrip()
    title = Text.assemble(f"a sample of {phase}, ", ("green is trained on", "green"))
    return Panel(text, title=title, title_align="left", box=box.ROUNDED, border_style="dim")
