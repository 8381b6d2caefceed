"""How a job in a cluster stands, for a person: a row of the table, the page of one job, and what to do next. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from sft_api.status import Attempt, Condition, ConditionType, State
from sft_cli.clusters import ClusterJob, number_of
from sft_trainer.report import wording

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

LABEL_WIDTH = 14
SILENT_SECONDS = 60
"""How old the last step may be before its age is worth a word."""
UNSEEN_SECONDS = 30
"""How long an operator may take to look at a new job for the first time."""
MESSAGE_CHARACTERS = 300
"""Of an earlier attempt; what matters now is shown whole."""
NOTHING = "–"

STYLES = {
    State.SUCCEEDED: "bold green",
    State.FAILED: "bold red",
    State.RESTARTING: "yellow",
    State.QUEUED: "yellow",
    State.SUSPENDED: "dim",
}
TELLING = {
    State.PENDING: (ConditionType.GANG_SCHEDULED,),
    State.PREPARING: (ConditionType.PREPARED,),
    State.QUEUED: (ConditionType.GANG_SCHEDULED, ConditionType.RUNNING),
    State.FAILED: (ConditionType.SUCCEEDED,),
}
"""The conditions that say what a job waits for, or died of, in each state."""
QUIET = {"NoPods", "NotStarted", "Starting"}
"""Reasons that tell no more than the state does."""


def state_of(job: ClusterJob) -> str:
    if job.deleting:
        return "Deleting"
    return job.status.state.value if job.status.state else "New"


def age(then: datetime, now: datetime) -> str:
    """45s, 12m, 5h, 3d: as kubectl's, in one unit."""
    seconds = max(0, int((now - then).total_seconds()))
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "m"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // divisor}{unit}"
    return f"{seconds // 86_400}d"


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────────────────


def table_of(jobs: Sequence[ClusterJob], now: datetime, with_namespace: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*(("namespace",) if with_namespace else ()), "name", "state", "phase"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "done", "left", "loss", "tokens/s", "restarts", "checkpoint", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    for job in jobs:
        first = (job.namespace,) if with_namespace else ()
        state = Text(state_of(job), style=STYLES.get(job.status.state, "") if job.status.state else "")
        table.add_row(*map(Text, first), Text(job.name), state, *map(Text, figures(job, now)))
    return table


def figures(job: ClusterJob, now: datetime) -> Iterator[str]:
    """The row's cells after the state."""
    status = job.status
    phase, progress, checkpoint = status.phase, status.progress, status.checkpoint
    yield f"{phase.name} {phase.index + 1}/{phase.count}" if phase else NOTHING
    yield f"{progress.step:,}/{progress.total_steps:,}" if progress else NOTHING
    yield f"{progress.percent}%" if progress else NOTHING
    yield time_left(job) or NOTHING
    yield wording.number(progress.loss) if progress and progress.loss is not None else NOTHING
    speed = progress.tokens_per_second if progress and is_running(job) else None
    yield wording.short_count(speed) if speed is not None else NOTHING
    yield str((status.restarts or 0) + (status.disruptions or 0))
    verified = " ✓" if checkpoint and checkpoint.verified else ""
    yield f"{age(checkpoint.time, now)}{verified}" if checkpoint else NOTHING
    yield age(job.created, now)
    told = [condition.reason for condition in telling(job)]
    yield told[0] if told else ""


def is_running(job: ClusterJob) -> bool:
    return job.status.state is State.RUNNING


def time_left(job: ClusterJob) -> str | None:
    progress = job.status.progress
    if progress is None or progress.eta_seconds is None or not is_running(job):
        return None
    return wording.duration(progress.eta_seconds)


# ── one job ────────────────────────────────────────────────────────────────────────────────────────────────────────


def page_of(job: ClusterJob, now: datetime) -> RenderableType:
    """Everything about one job that fits on a screen."""
    from rich.console import Group
    from rich.text import Text

    style = STYLES.get(job.status.state, "bold") if job.status.state else "bold"
    where = f"  in {job.namespace}, {age(job.created, now)} old"
    lines: list[RenderableType] = [Text.assemble((job.name, "bold"), "  ", (state_of(job), style), (where, "dim"))]
    lines += [Text.assemble((f"{label:<{LABEL_WIDTH}}", "dim"), value) for label, value in rows(job, now)]
    if job.status.attempts:
        lines.append(attempts_table(job.status.attempts, now))
    lines += [condition_line(condition, now) for condition in telling(job)]
    lines += [Text(f"→ {sentence}") for sentence in advice(job, now)]
    return Group(*lines)


def rows(job: ClusterJob, now: datetime) -> Iterator[tuple[str, str]]:
    """Label and value of each line; only what this job has."""
    status = job.status
    if status.phase:
        epoch = f", epoch {status.progress.epoch}" if status.progress else ""
        yield "phase", f"{status.phase.name}, {status.phase.index + 1} of {status.phase.count}{epoch}"
    yield from progress_rows(job, now)
    if status.progress is None and status.plan:
        steps = sum(phase.steps for phase in status.plan.phases)
        yield "to train", f"{status.plan.samples:,} samples, {status.plan.tokens:,} tokens, {steps:,} steps"
    if status.checkpoint:
        checkpoint = status.checkpoint
        verified = "verified" if checkpoint.verified else "not read back"
        yield "checkpoint", f"step {checkpoint.step:,}, {age(checkpoint.time, now)} ago, {verified}: {checkpoint.uri}"
    if status.export:
        yield "model", status.export.uri
    if status.restarts or status.disruptions:
        yield "restarts", restarts(job)
    if status.held_seconds:
        yield "time", time_held(job)


def progress_rows(job: ClusterJob, now: datetime) -> Iterator[tuple[str, str]]:
    progress = job.status.progress
    if progress is None:
        return
    left = time_left(job)
    done = f"{progress.step:,} of {progress.total_steps:,}, {progress.percent}%"
    yield "step", done + (f", {left} left" if left else "")
    signals = {
        "loss": progress.loss,
        "gradient norm": progress.grad_norm,
        "learning rate": progress.learning_rate,
    }
    if known := [f"{name} {wording.number(value)}" for name, value in signals.items() if value is not None]:
        yield "signals", ", ".join(known)
    if is_running(job) and progress.tokens_per_second is not None:
        yield "speed", speed_of(job)
    if is_running(job) and (now - progress.heartbeat).total_seconds() > SILENT_SECONDS:
        yield "last step", f"ended {age(progress.heartbeat, now)} ago"


def speed_of(job: ClusterJob) -> str:
    progress = job.status.progress
    assert progress is not None
    parts = [f"{wording.count(progress.tokens_per_second or 0.0)} tokens/s"]
    parts += [f"{wording.percent(progress.mfu)} MFU"] if progress.mfu is not None else []
    parts += [f"packing {wording.percent(progress.packing_efficiency)}"] if progress.packing_efficiency else []
    return ", ".join(parts)


def restarts(job: ClusterJob) -> str:
    """How much of each budget is spent."""
    status, lifecycle = job.status, job.spec.get("lifecycle") or {}
    allowed = [f" of {lifecycle[name]}" if name in lifecycle else "" for name in ("maxRestarts", "maxDisruptions")]
    return (
        f"{status.restarts or 0}{allowed[0]} after failures without a newer checkpoint,"
        f" {status.disruptions or 0}{allowed[1]} after disruptions"
    )


def time_held(job: ClusterJob) -> str:
    status = job.status
    parts = [f"{wording.duration(status.held_seconds or 0.0)} on its nodes"]
    parts += [f"{status.gpu_seconds / 3600:,.1f} GPU hours"] if status.gpu_seconds else []
    parts += [f"{wording.percent(status.goodput)} of it in steps that count"] if status.goodput is not None else []
    return ", ".join(parts)


def attempts_table(attempts: Sequence[Attempt], now: datetime) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("attempt", "began", "lasted", "from step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended by", no_wrap=True)
    table.add_column("")
    for attempt in attempts:
        ended = attempt.ended or now
        table.add_row(
            Text(str(number_of(attempt))),
            f"{age(attempt.started, now)} ago",
            wording.duration((ended - attempt.started).total_seconds()),
            "0" if attempt.resumed_from_step is None else f"{attempt.resumed_from_step:,}",
            Text(attempt.reason or ("goes on" if attempt.ended is None else NOTHING)),
            Text(shortened(attempt.message or "")),
        )
    return table


def shortened(message: str) -> str:
    line = " ".join(wording.visible(message).split())
    return line if len(line) <= MESSAGE_CHARACTERS else f"{line[:MESSAGE_CHARACTERS]} …"


def condition_line(condition: Condition, now: datetime) -> Text:
    from rich.text import Text

    since = age(condition.last_transition_time, now)
    head = f"{condition.type} is {condition.status} since {since}, {condition.reason}: "
    return Text.assemble(("! ", "bold yellow"), (head, "bold"), wording.visible(condition.message))


def telling(job: ClusterJob) -> list[Condition]:
    """The conditions that a person should read now."""
    if job.status.state is None:
        return []
    kinds = TELLING.get(job.status.state, ())
    return [
        condition
        for condition in job.status.conditions
        if condition.status == "False"
        and condition.reason not in QUIET
        and (condition.type in kinds or is_trouble(condition))
    ]


def is_trouble(condition: Condition) -> bool:
    """What is worth a word in every state."""
    return condition.type == ConditionType.CHECKPOINT_HEALTHY or condition.reason == "Stopping"


# ── what to do ─────────────────────────────────────────────────────────────────────────────────────────────────────


def advice(job: ClusterJob, now: datetime) -> list[str]:
    """What the person can do next; nothing where nothing is to be done."""
    status, name = job.status, f"{job.name} -n {job.namespace}"
    if job.deleting:
        return []
    if status.state is None:
        late = (now - job.created).total_seconds() > UNSEEN_SECONDS
        return ["No operator has looked at it: is the chart sftjob-operator installed, and its pod ready?"] * late
    if (status.observed_generation or 0) < job.generation:
        return ["The operator has not looked at the newest change yet."]
    if status.state is State.SUSPENDED:
        patch = """'{"spec": {"suspend": false}}'"""
        return [f"It goes on after kubectl patch sft {name} --type merge -p {patch}"]
    if status.state is State.FAILED:
        return list(after_failure(job, name))
    return [f"What it says meanwhile: sft logs {name} -f"] if is_silent(job, now) else []


def after_failure(job: ClusterJob, name: str) -> Iterator[str]:
    attempts, checkpoint = job.status.attempts, job.status.checkpoint
    if attempts:
        yield f"The last lines of its log: sft logs {name} --attempt {number_of(attempts[-1])}"
    elif any(condition.reason != "InvalidSpec" for condition in telling(job)):
        yield f"The log of the preparation: sft logs {name} --prepare"
    kept = f": it goes on after step {checkpoint.step:,}" if checkpoint else ""
    yield f"Once it is mended: kubectl delete sft {name}, and apply the manifest again{kept}"


def is_silent(job: ClusterJob, now: datetime) -> bool:
    progress = job.status.progress
    return is_running(job) and progress is not None and (now - progress.heartbeat).total_seconds() > 5 * SILENT_SECONDS
