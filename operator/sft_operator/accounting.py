"""What a job has achieved and what it has cost: from pods and the trainer's words into status. Pure."""

from __future__ import annotations

from datetime import datetime

from sft_api.status import Attempt
from sft_operator.observed import Pod
from sft_operator.restart import is_progress
from sft_operator.situation import Situation


def caught_up(at: Situation) -> Situation:
    """The situation with everything in its status that pods and trainer tell of the attempt that goes on."""
    if at.attempt is None:
        return at
    return with_costs(with_report(with_start(at)))


def with_attempt(at: Situation, attempt: Attempt) -> Situation:
    """The situation with its last attempt replaced."""
    return at.with_status(attempts=[*at.status.attempts[:-1], attempt])


def with_start(at: Situation) -> Situation:
    """When all pods of the attempt ran for the first time."""
    assert at.attempt is not None
    if at.attempt.running is not None or not at.all_running:
        return at
    return with_attempt(at, at.attempt.model_copy(update={"running": at.now}))


def with_report(at: Situation) -> Situation:
    """Phase, progress, checkpoint and export as the first rank told them."""
    report, attempt = at.report, at.attempt
    if report is None or attempt is None:
        return at
    told = {
        "phase": report.phase,
        "progress": report.progress,
        "checkpoint": report.checkpoint,
        "export": report.export,
    }
    at = at.with_status(**{name: value for name, value in told.items() if value is not None})
    if report.checkpoint is not None and is_progress(at.status, report.checkpoint.step):
        at = at.with_status(restarts=0)
    return with_attempt(at, attempt.model_copy(update={"resumed_from_step": report.resumed_from_step}))


def with_costs(at: Situation) -> Situation:
    """Time held, by the attempt and in all; GPU time; and the share of it that still counts."""
    attempt, status = at.attempt, at.status
    assert attempt is not None
    held = max(attempt.held_seconds or 0.0, held_seconds(at.pods, at.nodes, at.now))
    total = (status.held_seconds or 0.0) + held - (attempt.held_seconds or 0.0)
    gpus = at.nodes * at.job.spec.trainer.gpus_per_node
    at = with_attempt(at, attempt.model_copy(update={"held_seconds": held}))
    at = at.with_status(held_seconds=total, gpu_seconds=total * gpus)
    if at.report is not None and total > 0:
        at = at.with_status(goodput=min(1.0, round(at.report.productive_seconds / total, 4)))
    return at


def held_seconds(pods: tuple[Pod, ...], nodes: int, now: datetime) -> float:
    """How long the gang held its nodes: the pods' times on them, over their number, in whole seconds."""
    seconds = 0.0
    for pod in pods:
        if pod.scheduled is not None:
            until = pod.ended.finished if pod.ended else now
            seconds += max(0.0, (until - pod.scheduled).total_seconds())
    return float(round(seconds / nodes))
