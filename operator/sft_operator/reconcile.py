"""A job's whole life, as a checklist: what is, and what should therefore be. Pure: the same in, the same out.

    Pending ─▶ Preparing ─▶ Queued ─▶ Running ─▶ Succeeded
                               ▲         │ │
                               └ Restarting └───▶ Failed          Suspended: from anywhere before the end, and back

It never asks what changed. `sync` brings the world in and carries the decision out.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sft_api import labels
from sft_api.job import SFTJob
from sft_api.manifest import Problem
from sft_api.run import ExitCode
from sft_api.status import Attempt, ConditionType, SFTJobStatus, State
from sft_operator import objects
from sft_operator.admission import cluster_problems
from sft_operator.accounting import caught_up, with_attempt
from sft_operator.conditions import Verdict, conditions, judge
from sft_operator.observed import Decision, Manifest, ObjectRef, Observed
from sft_operator.restart import (
    Cause,
    back_off_seconds,
    find_cause,
    give_up,
    reason_of,
    said,
    words,
)
from sft_operator.settings import Settings
from sft_operator.situation import Situation

ATTEMPTS_KEPT = 10
POLL_SECONDS = 10.0
"""How often a job that is under way is looked at, though nothing changes: how old its progress may be."""
LATE = timedelta(seconds=30)
"""How long past its time a terminating pod is waited for: no kubelet will report it any more."""
HANG_MARGIN = timedelta(seconds=120)
"""The trainer's own watchdog comes first, and says more."""
LOG_CHARACTERS = 8192


def reconcile(job: SFTJob, observed: Observed, settings: Settings, now: datetime) -> Decision:
    """What should be true next of `job` in the world as observed."""
    at = caught_up(Situation(job, observed, settings, now, job.status or SFTJobStatus()))
    if at.status.finished is not None:
        return clean_up(at)
    if problems := cluster_problems(job, settings):
        return refuse(at.status, job.metadata.generation or 0, problems, now)
    if at.report is not None and at.report.complete:
        return succeed(at)
    if job.spec.suspend:
        return suspend(at)
    if (late := past_deadline(at)) is not None:
        return fail(at, late)
    if not is_prepared(at):
        return prepare(at)
    if at.gang_choice.missing is not None and at.attempt is None:
        return wait(at, State.PENDING, again_seconds=60.0)
    if at.attempt is None:
        return start_next(at)
    if (cause := hung(at) or unplaced(at) or find_cause(at.gang, at.pods, at.attempt.name, now)) is not None:
        return end_attempt(at, cause)
    return run(at)


def refuse(job_status: SFTJobStatus, generation: int, problems: Sequence[Problem], now: datetime) -> Decision:
    """For an object that is no valid SFTJob: a condition says what is wrong, and where. It is judged at each change."""
    reason, message = "InvalidSpec", "\n".join(str(problem) for problem in problems)
    verdicts = {kind: Verdict("Unknown", reason, "the spec is not valid") for kind in ConditionType}
    verdicts |= {
        ConditionType.SUCCEEDED: Verdict("False", reason, message),
        ConditionType.STALLED: Verdict("True", reason, message),
        ConditionType.RECONCILING: Verdict("False", reason, "the spec is not valid"),
    }
    changes = {
        "observed_generation": generation,
        "state": State.FAILED,
        "conditions": conditions(job_status.conditions, verdicts, generation, now),
    }
    return Decision(job_status.model_copy(update=changes))


# ── before the gang ────────────────────────────────────────────────────────────────────────────────────────────────


def past_deadline(at: Situation) -> Cause | None:
    """The job's own deadline; PyTorchJob's fires late."""
    seconds, created = at.job.spec.lifecycle.active_deadline_seconds, at.job.metadata.creation_timestamp
    if seconds is None or created is None:
        return None
    active = (at.now - created).total_seconds() - (at.status.suspended_seconds or 0.0) - suspended_now(at)
    if active <= seconds:
        return None
    return Cause(
        "DeadlineExceeded", f"not done within spec.lifecycle.activeDeadlineSeconds, {seconds:,}", permanent=True
    )


def suspended_now(at: Situation) -> float:
    """Seconds since the job was suspended; 0 where it is not."""
    since = at.since(ConditionType.SUSPENDED)
    return (at.now - since).total_seconds() if since and at.holds(ConditionType.SUSPENDED) else 0.0


def is_prepared(at: Situation) -> bool:
    return at.holds(ConditionType.PREPARED)


def prepare(at: Situation) -> Decision:
    """The Job that prepares the data, and what it found."""
    job = at.observed.prepare
    if job is not None and job.complete:
        plans = [account.plan for pod in at.prepare_pods if (account := said(pod)) and account.plan]
        at = at.with_status(plan=plans[-1] if plans else at.status.plan)
        return wait(at, State.QUEUED, again_seconds=0.0)
    if job is not None and job.failed:
        ended = [pod for pod in at.prepare_pods if pod.ended and pod.ended.exit_code]
        if not ended:
            return fail(at, Cause("PrepareFailed", f"the preparation failed: {job.failed}", permanent=True))
        code = ended[-1].ended.exit_code if ended[-1].ended else ExitCode.DATA
        return fail(at, Cause(reason_of(code), f"the preparation failed: {words(ended[-1])}", permanent=True))
    return standing(
        at, State.PREPARING, apply=(config(at), objects.prepare_job(at.job, at.settings)), again=POLL_SECONDS
    )


# ── the gang ───────────────────────────────────────────────────────────────────────────────────────────────────────


def start_next(at: Situation) -> Decision:
    """The next attempt, once nothing of the last is left and its back-off is over."""
    if leftovers_exist(at):
        return wait(at, State.RESTARTING, delete=leftovers(at))
    due = restart_due(at)
    if at.now < due:
        return wait(at, State.RESTARTING, again_seconds=(due - at.now).total_seconds())
    number = at.number + 1
    attempt = Attempt(name=labels.attempt(at.job.metadata.name, number), started=at.now)
    started = at.with_status(attempts=[*at.status.attempts, attempt][-ATTEMPTS_KEPT:])
    manifests = objects.attempt(at.job, number, at.gang_choice, at.settings)
    return standing(started, State.QUEUED, apply=(config(at), *manifests), again=POLL_SECONDS)


def restart_due(at: Situation) -> datetime:
    """When the next attempt may begin: at once, but for the back-off after one that was not suspended."""
    last = at.last_attempt
    if last is None or last.ended is None or last.reason == SUSPENDED:
        return at.now
    return last.ended + timedelta(seconds=back_off_seconds(at.status.attempts))


def run(at: Situation) -> Decision:
    """The attempt goes on, or comes to be: see that all of it is there, and say how it does."""
    state = State.RUNNING if at.all_running else State.QUEUED
    return standing(at, state, apply=(config(at),), again=POLL_SECONDS)


def hung(at: Situation) -> Cause | None:
    """No step has ended for longer than the hang time-out, and the trainer's own watchdog has not spoken."""
    if not at.all_running:
        return None
    signs = [pod.scheduled for pod in at.pods if pod.scheduled]
    sign = max([*signs, at.status.progress.heartbeat] if at.status.progress else signs, default=at.now)
    seconds = at.job.spec.lifecycle.hang_timeout_seconds
    if at.now - sign <= timedelta(seconds=seconds) + HANG_MARGIN:
        return None
    silent = int((at.now - sign).total_seconds())
    return Cause(
        reason_of(ExitCode.HUNG),
        f"no step has ended for {silent:,} s; spec.lifecycle.hangTimeoutSeconds is {seconds:,}",
    )


def unplaced(at: Situation) -> Cause | None:
    """The gang did not come to run within the scheduling time-out."""
    attempt, seconds = at.attempt, at.job.spec.scheduling.timeout_seconds
    if seconds is None or attempt is None or attempt.running is not None or (at.gang and at.gang.queued):
        return None
    since = min((pod.created for pod in at.pods), default=attempt.started)
    if (at.now - since).total_seconds() <= seconds:
        return None
    count = sum(pod.is_running for pod in at.pods)
    message = f"{count} of {at.nodes} pods ran within spec.scheduling.timeoutSeconds, {seconds:,}"
    return Cause("NotScheduled", message, permanent=True)


def end_attempt(at: Situation, cause: Cause) -> Decision:
    """Put the cause on record, then decide whether there is another attempt."""
    at = recorded(at, cause)
    if cause.disruption:
        at = at.with_status(disruptions=(at.status.disruptions or 0) + 1)
    elif not cause.permanent:
        at = at.with_status(restarts=(at.status.restarts or 0) + 1)
    final = give_up(cause, at.status.restarts or 0, at.status.disruptions or 0, at.job.spec.lifecycle)
    if final is not None:
        return fail(at, Cause(cause.reason, final, permanent=True))
    return wait(at, State.RESTARTING, delete=leftovers(at))


def recorded(at: Situation, cause: Cause) -> Situation:
    """The attempt that goes on, ended by this cause; nothing where it had ended before."""
    if at.attempt is None:
        return at
    log = at.observed.logs.get(cause.pod or "")
    ending = {
        "ended": at.now,
        "reason": cause.reason,
        "message": cause.message[:4096],
        "disruption": cause.disruption,
        "checkpoint_step": at.status.checkpoint.step if at.status.checkpoint else None,
        "log": log[-LOG_CHARACTERS:] if log else None,
    }
    return with_attempt(at, at.attempt.model_copy(update=ending))


# ── ends ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SUSPENDED = "Suspended"


def suspend(at: Situation) -> Decision:
    """Take the gang down, which commits a checkpoint on its way, and hold still."""
    prepare_job = at.observed.prepare
    unfinished = prepare_job is not None and not prepare_job.complete and not is_prepared(at)
    if leftovers_exist(at) or unfinished:
        stop = prepare_leftovers(at) if unfinished else ()
        stopping = Verdict("False", "Stopping", "spec.suspend is true: the pods commit a checkpoint and end")
        return wait(
            at,
            at.status.state or State.PENDING,
            delete=(*leftovers(at), *stop),
            better={ConditionType.SUSPENDED: stopping},
        )
    at = recorded(at, Cause(SUSPENDED, "spec.suspend was set to true", disruption=None))
    return standing(at, State.SUSPENDED)


def succeed(at: Situation) -> Decision:
    """Everything is trained, committed and exported: the trainer said so after it was."""
    at = recorded(at, Cause("Completed", "trained, committed and exported", disruption=None))
    at = at.with_status(finished=at.now)
    export = f"; the model is at {at.status.export.uri}" if at.status.export else ""
    steps = f"{at.status.progress.total_steps:,} steps" if at.status.progress else "all steps"
    done = Verdict("True", "Completed", f"{steps} trained, and the final checkpoint committed{export}")
    return standing(at, State.SUCCEEDED, better={ConditionType.SUCCEEDED: done}, again=POLL_SECONDS)


def fail(at: Situation, cause: Cause) -> Decision:
    """For good: the reason in every place where one looks for it."""
    at = recorded(at, cause).with_status(finished=at.now)
    failed = Verdict("False", cause.reason, cause.message)
    ended = {ConditionType.SUCCEEDED: failed, ConditionType.STALLED: Verdict("True", cause.reason, cause.message)}
    if not is_prepared(at):
        ended[ConditionType.PREPARED] = failed
    return standing(at, State.FAILED, better=ended, again=POLL_SECONDS)


def clean_up(at: Situation) -> Decision:
    """After the end: nothing may still run, and what is left goes when its time is over."""
    assert at.status.finished is not None
    status = at.status.model_copy(update={"observed_generation": at.job.metadata.generation})
    ttl = at.job.spec.lifecycle.ttl_seconds_after_finished
    left = None if ttl is None else ttl - (at.now - at.status.finished).total_seconds()
    if left is not None and left <= 0:
        found = everything(at)
        return Decision(status, delete=found, again_seconds=POLL_SECONDS if found else None)
    if stop := still_at_work(at):
        return Decision(status, delete=stop, again_seconds=POLL_SECONDS)
    return Decision(status, again_seconds=left)


def still_at_work(at: Situation) -> tuple[ObjectRef, ...]:
    """What would go on though the job has ended; a gang that has ended is tidied by the training operator."""
    ended = at.gang is None or at.gang.failed or at.gang.succeeded
    gang = () if ended and not any(pod.deleting for pod in at.live_pods) else leftovers(at)
    prepare_job = at.observed.prepare
    done = prepare_job is None or prepare_job.complete or prepare_job.failed
    return (*gang, *(() if done else prepare_leftovers(at)))


def everything(at: Situation) -> tuple[ObjectRef, ...]:
    """All children that are still there."""
    name = labels.config_map(at.job.metadata.name)
    config_map = (ObjectRef("ConfigMap", name),) if at.observed.has_config else ()
    return (*leftovers(at), *prepare_leftovers(at), *config_map)


# ── shared ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def leftovers_exist(at: Situation) -> bool:
    """Whether anything of the attempts so far is still there."""
    return any(gang.attempt <= at.number for gang in at.observed.gangs) or any(
        pod.attempt <= at.number for pod in at.observed.pods if pod.attempt and not pod.gone
    )


def leftovers(at: Situation) -> tuple[ObjectRef, ...]:
    """What is to be deleted of the attempts so far: gangs once, pods only where nobody else will."""
    found: list[ObjectRef] = []
    for gang in at.observed.gangs:
        if gang.attempt <= at.number and not gang.deleting:
            found.append(ObjectRef("PyTorchJob", gang.name, gang.uid))
    for group in at.observed.pod_groups:
        if not group.deleting:
            found.append(ObjectRef("PodGroup", group.name, group.uid))
    found.extend(
        ObjectRef("Pod", pod.name, pod.uid, force=True)
        for pod in at.observed.pods
        if pod.attempt and pod.attempt <= at.number and not pod.gone and is_stuck(at, pod.deleting, pod.node)
    )
    return tuple(found)


def prepare_leftovers(at: Situation) -> tuple[ObjectRef, ...]:
    job = at.observed.prepare
    return (ObjectRef("Job", job.name, job.uid),) if job is not None and not job.deleting else ()


def is_stuck(at: Situation, deleting: datetime | None, node: str | None) -> bool:
    """Whether a terminating pod will never be confirmed gone: its node is lost, or its time is long over."""
    if deleting is None:
        return False
    return node in at.observed.lost_nodes or at.now > deleting + LATE


def config(at: Situation) -> Manifest:
    return objects.config_map(at.job)


def wait(
    at: Situation,
    state: State,
    delete: tuple[ObjectRef, ...] = (),
    again_seconds: float = POLL_SECONDS,
    better: dict[ConditionType, Verdict] | None = None,
) -> Decision:
    return standing(at, state, delete=delete, again=again_seconds, better=better)


def standing(
    at: Situation,
    state: State,
    *,
    apply: tuple[Manifest, ...] = (),
    delete: tuple[ObjectRef, ...] = (),
    again: float | None = None,
    better: dict[ConditionType, Verdict] | None = None,
) -> Decision:
    """The decision, with its status put together: the state, and every condition as it is judged there."""
    verdicts = judge(at, state) | (better or {})
    generation = at.job.metadata.generation
    goes_on = verdicts[ConditionType.SUSPENDED].status != "True"
    changes = {
        "observed_generation": generation,
        "state": state,
        "conditions": conditions(at.status.conditions, verdicts, generation, at.now),
        "restarts": at.status.restarts or 0,
        "disruptions": at.status.disruptions or 0,
        "suspended_seconds": (at.status.suspended_seconds or 0.0) + (suspended_now(at) if goes_on else 0.0),
    }
    return Decision(at.status.model_copy(update=changes), apply, delete, again)
