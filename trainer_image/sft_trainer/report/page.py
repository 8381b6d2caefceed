"""The HTML page: what it says and in which order. Every text goes through jinja2's escaping; nothing is fetched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sft_api.run import ExitCode, RunConfig
from sft_trainer.report import wording
from sft_trainer.report.curves import payload
from sft_trainer.report.figures import StepFigures, job_figures, phase_figures, validation_change
from sft_trainer.report.history import History


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. `config` is none where only the metrics are at hand."""

    name: str
    uri: str
    """Where the job keeps its results: `checkpoints.uri`."""
    history: History
    generated: datetime
    config: RunConfig | None = None


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the job stands. `tone` is good, bad or open."""

    word: str
    tone: str
    message: str = ""


def render(data: ReportData) -> str:
    """The report as one self-contained HTML page."""
    history = data.history
    figures = job_figures(history)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            history=history,
            figures=figures,
            outcome=outcome(history),
            tiles=tiles(history, figures),
            phases=phase_rows(history, data.config),
            settings=settings(data.config),
            config_json=data.config.model_dump_json(indent=2, by_alias=True) if data.config else None,
            payload=script_json(payload(history)),
        )
    )


@cache
def environment() -> Environment:
    folder = PackageLoader("sft_trainer.report", ".")
    made = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name in ("count", "short_count", "size", "duration", "percent", "rate", "number", "moment", "visible"):
        made.filters[name] = getattr(wording, name)
    made.filters["dropped"] = wording.dropped
    made.globals["asset"] = asset
    return made


@cache
def asset(name: str) -> Markup:
    """A file of this package, to stand in the page as it is: ours or uPlot's, never a user's."""
    text = files("sft_trainer.report").joinpath(*name.split("/")).read_text(encoding="utf-8")
    assert "</script" not in text, "it would end the script element it stands in"
    return Markup(text)


def script_json(value: object) -> Markup:
    """JSON that may stand in a script element: no character of it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


TONES = {ExitCode.COMPLETED.value: "good", ExitCode.PREEMPTED.value: "open"}


def outcome(history: History) -> Outcome:
    finished = history.finished
    if finished is not None:
        tone = TONES.get(finished.exit_code, "bad")
        return Outcome(finished.reason, tone, finished.message)
    total = history.total_steps
    if total and history.steps and history.steps[-1].step >= total:
        return Outcome("Trained to the end", "good")
    return Outcome("Under way" if history.steps else "Not begun", "open")


def tiles(history: History, figures: StepFigures | None) -> list[Tile]:
    if figures is None:
        return []
    total = history.total_steps
    steps = wording.count(figures.last_step) + (f" / {wording.count(total)}" if total else "")
    found = [Tile("Training loss", change(figures.first_loss, figures.last_loss, wording.number), "nats per token")]
    if scored := validation_change(history):
        before, after = scored
        found.append(Tile("Held-out loss", change(before.loss, after.loss, wording.number), "nats per token"))
        found.append(Tile("Held-out accuracy", change(before.accuracy, after.accuracy, wording.percent), "next token"))
    found += [
        Tile("Steps", steps, f"{wording.count(history.steps_lost)} repeated" if history.steps_lost else ""),
        Tile("Samples", wording.count(figures.samples)),
        Tile("Tokens", wording.short_count(figures.tokens), f"{wording.short_count(figures.loss_tokens)} trained on"),
        Tile("Throughput", wording.short_count(figures.tokens_per_second), "tokens per second"),
        Tile(
            "Packing",
            wording.percent(figures.packing_efficiency),
            f"best possible {wording.percent(figures.packing_bound)}",
        ),
        Tile("Time in steps", wording.duration(figures.seconds)),
        Tile("Checkpoints", wording.count(len(history.checkpoints))),
    ]
    if figures.mfu is not None:
        found.append(Tile("Model FLOPs utilisation", wording.percent(figures.mfu), "of the dense bf16 peak"))
    return found


def change(before: float, after: float, worded: object) -> str:
    assert callable(worded)
    return f"{worded(before)} → {worded(after)}"


@dataclass(frozen=True)
class PhaseRow:
    """A phase: what was asked of it and what came of it."""

    name: str
    samples: int | None
    epochs: int | None
    batch: int | None
    steps: int | None
    learning_rate: str
    figures: StepFigures | None


def phase_rows(history: History, config: RunConfig | None) -> list[PhaseRow]:
    """The phases in the order of the job, those that took no step yet as well."""
    planned = {plan.name: plan for plan in history.started.phases} if history.started else {}
    resolved = {phase.name: phase for phase in config.phases} if config else {}
    walked = {figures.name: figures for figures in phase_figures(history)}
    rows = []
    for name in dict.fromkeys([*resolved, *planned, *walked]):
        plan, asked = planned.get(name), resolved.get(name)
        rows.append(
            PhaseRow(
                name=name,
                samples=plan.samples if plan else None,
                epochs=plan.epochs if plan else asked.epochs if asked else None,
                batch=asked.batch.effective_batch_size if asked else None,
                steps=plan.steps if plan else None,
                learning_rate=f"{wording.rate(asked.optimizer.learning_rate)} {asked.optimizer.schedule}"
                if asked
                else "",
                figures=walked.get(name),
            )
        )
    return rows


def settings(config: RunConfig | None) -> list[tuple[str, list[str]]]:
    """The resolved recipe as rows: a field, and its value in each phase (or once, where it is the job's)."""
    if config is None:
        return []
    rows: list[tuple[str, list[str]]] = []
    dumped = [phase.model_dump(mode="json", by_alias=True) for phase in config.phases]
    for part in ("epochs", "lengths", "batch", "optimizer"):
        values = [phase[part] for phase in dumped]
        if not isinstance(values[0], dict):
            rows.append((part, [told(value) for value in values]))
            continue
        rows += [(f"{part}.{key}", [told(value[key]) for value in values]) for key in values[0]]
    return rows


def told(value: object) -> str:
    """A value as a person writes it: `steps 25` for {steps: 25}."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {told(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(told(inner) for inner in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value)
