"""The limits in time that a job sets itself: its deadline, the wait for nodes, the longest step. Pure.

PyTorchJob has fields of the like; they fire late or not at all.
"""

from __future__ import annotations

from datetime import timedelta

from sft_api.pods import GangScheduler
from sft_api.run import ExitCode
from sft_api.status import ConditionType
from sft_operator.restart import Cause, reason_of
from sft_operator.situation import Situation

HANG_MARGIN = timedelta(seconds=120)
"""The trainer's own watchdog comes first, and says more."""


def past_deadline(at: Situation) -> Cause | None:
    """The job is not done within its deadline."""
    seconds, created = at.job.spec.lifecycle.active_deadline_seconds, at.job.metadata.creation_timestamp
    if seconds is None or created is None:
        return None
    active = (at.now - created).total_seconds() - (at.status.suspended_seconds or 0.0) - suspended_now(at)
    if active <= seconds:
        return None
    message = f"not done within spec.lifecycle.activeDeadlineSeconds, {seconds:,}"
    return Cause("DeadlineExceeded", message, permanent=True)


def suspended_now(at: Situation) -> float:
    """Seconds since the job was suspended; 0 where it is not."""
    since = at.since(ConditionType.SUSPENDED)
    return (at.now - since).total_seconds() if since and at.holds(ConditionType.SUSPENDED) else 0.0


def hung(at: Situation) -> Cause | None:
    """The gang answers, and what it says is old: no step has ended for longer than the hang time-out.

    A gang that does not answer is left to its own watchdog: a network policy may stand between it and the operator.
    """
    answer, running = at.observed.report, at.attempt.running if at.attempt else None
    if answer is None or running is None or not at.all_running:
        return None
    sign = max(running, answer.progress.heartbeat) if answer.progress else running
    seconds = at.job.spec.lifecycle.hang_timeout_seconds
    if at.now - sign <= timedelta(seconds=seconds) + HANG_MARGIN:
        return None
    silent = int((at.now - sign).total_seconds())
    message = f"no step has ended for {silent:,} s; spec.lifecycle.hangTimeoutSeconds is {seconds:,}"
    return Cause(reason_of(ExitCode.HUNG), message)


def unplaced(at: Situation) -> Cause | None:
    """The gang did not come to run within the scheduling time-out."""
    attempt, seconds = at.attempt, at.job.spec.scheduling.timeout_seconds
    if seconds is None or attempt is None or attempt.running is not None or waits_in_queue(at):
        return None
    since = min((pod.created for pod in at.live_pods), default=attempt.started)
    if (at.now - since).total_seconds() <= seconds:
        return None
    count = sum(pod.is_running for pod in at.pods)
    message = f"{count} of {at.nodes} pods ran within spec.scheduling.timeoutSeconds, {seconds:,}"
    return Cause("NotScheduled", message, permanent=True)


def waits_in_queue(at: Situation) -> bool:
    """Whether Kueue holds the gang back, or has let it go so lately that there are no pods."""
    is_held = at.gang is not None and at.gang.queued
    return is_held or (at.gang_choice.scheduler is GangScheduler.KUEUE and not at.live_pods)
