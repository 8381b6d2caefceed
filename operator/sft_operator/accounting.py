"""What a job has achieved and what it has cost: from pods and the trainer's words into status. Pure."""

from __future__ import annotations

import math
from datetime import datetime

from sft_api.status import Attempt, Progress
from sft_operator.observed import Pod
from sft_operator.restart import is_progress, said
from sft_operator.situation import Situation

ATTEMPTS_KEPT = 10


def caught_up(at: Situation) -> Situation:
    """The situation with everything in its status that pods and trainer tell.

    Of the last attempt they tell even after its end, while its pods leave: they commit a checkpoint on their way.
    """
    at = with_plan(with_adopted(at))
    return with_costs(with_report(with_start(at))) if at.last_attempt is not None else at


def with_adopted(at: Situation) -> Situation:
    """An attempt that is there and that the status does not know belongs to the job: writing the status failed."""
    newest = max(at.observed.gangs, key=lambda gang: gang.attempt, default=None)
    if newest is None or newest.attempt <= at.number:
        return at
    return with_next_attempt(at, Attempt(name=newest.name, started=newest.created))


def with_next_attempt(at: Situation, attempt: Attempt) -> Situation:
    return at.with_status(attempts=[*at.status.attempts, attempt][-ATTEMPTS_KEPT:])


def with_attempt(at: Situation, attempt: Attempt) -> Situation:
    """The situation with its last attempt replaced."""
    return at.with_status(attempts=[*at.status.attempts[:-1], attempt])


def with_plan(at: Situation) -> Situation:
    """What the preparation found: in its pod's account, which may be seen later than the end of its Job."""
    plans = [account.plan for pod in at.prepare_pods if (account := said(pod)) and account.plan]
    return at.with_status(plan=plans[-1]) if plans and at.status.plan is None else at


def with_start(at: Situation) -> Situation:
    """When all pods of the attempt ran for the first time."""
    if at.attempt is None or at.attempt.running is not None or not at.all_running:
        return at
    return with_attempt(at, at.attempt.model_copy(update={"running": at.now}))


def with_report(at: Situation) -> Situation:
    """Phase, progress, checkpoint and export as the first rank told them."""
    report, attempt = at.report, at.last_attempt
    if report is None or attempt is None:
        return at
    told = {
        "phase": report.phase,
        "progress": finite(report.progress),
        "checkpoint": report.checkpoint,
        "export": report.export,
        "restarts": 0 if report.checkpoint and counts_anew(at, attempt, report.checkpoint.step) else None,
    }
    facts: dict[str, int | None] = {"resumed_from_step": report.resumed_from_step}
    if attempt.ended is not None and report.checkpoint is not None:
        facts["checkpoint_step"] = report.checkpoint.step
    at = at.with_status(**{name: value for name, value in told.items() if value is not None})
    return with_attempt(at, attempt.model_copy(update=facts))


def counts_anew(at: Situation, attempt: Attempt, checkpoint_step: int) -> bool:
    """Whether this checkpoint makes failures count anew; not the failure that ended the attempt before it was told."""
    has_failed = attempt.ended is not None and attempt.disruption is False
    return is_progress(at.status, checkpoint_step) and not has_failed


def finite(progress: Progress | None) -> Progress | None:
    """Without figures that are no numbers: JSON has no word for them, and a status with one is refused as a whole."""
    if progress is None:
        return None
    unspeakable = {name: None for name, value in progress if isinstance(value, float) and not math.isfinite(value)}
    return progress.model_copy(update=unspeakable)


def with_costs(at: Situation) -> Situation:
    """Time held, by the attempt and in all; GPU time; and the share of it that still counts."""
    attempt, status = at.last_attempt, at.status
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
