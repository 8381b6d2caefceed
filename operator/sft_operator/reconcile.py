"""A job's whole life, as a checklist: what is, and what should therefore be. Pure: the same in, the same out.

    Pending ─▶ Preparing ─▶ Queued ─▶ Running ─▶ Succeeded
                               ▲         │ │
                               └ Restarting └───▶ Failed          Suspended: from anywhere before the end, and back

It never asks what changed. `sync` brings the world in and carries the decision out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from sft_api import labels
from sft_api.job import SFTJob
from sft_api.manifest import Problem
from sft_api.pods import GangScheduler
from sft_api.status import Attempt, ConditionType, SFTJobStatus, State
from sft_operator import leftovers, objects
from sft_operator.accounting import caught_up, with_attempt, with_costs, with_next_attempt
from sft_operator.admission import cluster_problems
from sft_operator.conditions import MESSAGE_CHARACTERS, Verdict, clipped, conditions, judge
from sft_operator.limits import hung, past_deadline, suspended_now, unplaced
from sft_operator.observed import Decision, Manifest, ObjectRef, Observed
from sft_operator.restart import Cause, back_off_seconds, find_cause, give_up, reason_in, words
from sft_operator.settings import Settings
from sft_operator.situation import Situation

POLL_SECONDS = 10.0
"""How often a job that is under way is looked at, though nothing changes: how old its progress may be."""
LOG_CHARACTERS = 8192
SUSPENDED = "Suspended"
STOPPING = "Stopping"


def reconcile(job: SFTJob, observed: Observed, settings: Settings, now: datetime) -> Decision:
    """What should be true next of `job` in the world as observed."""
    mine = leftovers.own(observed, job.metadata.uid)
    at = caught_up(Situation(job, mine, settings, now.replace(microsecond=0), job.status or SFTJobStatus()))
    if job.metadata.deletion_timestamp is not None:
        return let_go(at)
    if at.status.finished is not None:
        return clean_up(at)
    if at.attempt is None and (problems := cluster_problems(job, settings)):
        return refuse(at.status, job.metadata.generation or 0, problems, at.now)
    if at.report is not None and at.report.complete:
        return succeed(at)
    if job.spec.suspend or is_stopping(at):
        return suspend(at)
    if (late := past_deadline(at)) is not None:
        return fail(at, late)
    if at.attempt is not None:
        cause = find_cause(at.gang, at.pods, at.attempt, at.now) or hung(at) or unplaced(at)
        return end_attempt(at, cause) if cause is not None else run(at)
    before = replace(at, observed=leftovers.namesakes(observed, job.metadata.uid))
    if leftovers.anything_exists(before):
        return wait_for_namesake(at, (*leftovers.of_gangs(before), *leftovers.of_preparation(before)))
    if not is_prepared(at):
        return prepare(at)
    if leftovers.gang_exists(at) or leftovers.of_gangs(at):
        return standing(at, State.RESTARTING, delete=leftovers.of_gangs(at))
    if at.gang_choice.missing is not None:
        return standing(at, State.PENDING)
    if at.now < (due := restart_due(at)):
        return standing(at, State.RESTARTING, again=(due - at.now).total_seconds())
    return start_next(at)


def refuse(before: SFTJobStatus, generation: int, problems: Sequence[Problem], now: datetime) -> Decision:
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
        "conditions": conditions(before.conditions, verdicts, generation, now),
    }
    return Decision(before.model_copy(update=changes))


# ── before the gang ────────────────────────────────────────────────────────────────────────────────────────────────


def wait_for_namesake(at: Situation, delete: tuple[ObjectRef, ...]) -> Decision:
    """An earlier job of this name was deleted, and not all of its objects are gone."""
    message = "the objects of an earlier job of this name are on their way out"
    waiting = Verdict("True", "NamesakeLeaving", message)
    return standing(at, State.PENDING, delete=delete, better={ConditionType.RECONCILING: waiting})


def is_prepared(at: Situation) -> bool:
    return at.holds(ConditionType.PREPARED) or at.last_attempt is not None


def prepare(at: Situation) -> Decision:
    """The Job that prepares the data, and what it found. It is made once: a Job's template cannot be changed."""
    job = at.observed.prepare
    if job is None:
        return standing(at, State.PREPARING, apply=(config(at), objects.prepare_job(at.job, at.settings)))
    if job.complete:
        return standing(at, State.QUEUED, again=0.0)
    if job.failed is not None:
        return fail(at, cause_of_preparation(at, job.failed))
    return standing(at, State.PREPARING, apply=(config(at),))


def cause_of_preparation(at: Situation, failed: str) -> Cause:
    """Why the preparation failed for good, in the words of its last pod where that left any."""
    ended = [pod for pod in at.prepare_pods if pod.ended is not None and pod.ended.exit_code != 0]
    if not ended or (end := ended[-1].ended) is None:
        return Cause("PrepareFailed", f"the preparation failed: {failed}", permanent=True)
    return Cause(reason_in(end), f"the preparation failed: {words(ended[-1])}", permanent=True)


# ── the gang ───────────────────────────────────────────────────────────────────────────────────────────────────────


def restart_due(at: Situation) -> datetime:
    """When the next attempt may begin: at once, but for the back-off after one that was not suspended."""
    last = at.last_attempt
    if last is None or last.ended is None or last.reason == SUSPENDED:
        return at.now
    return last.ended + timedelta(seconds=back_off_seconds(at.status.attempts))


def start_next(at: Situation) -> Decision:
    """The next attempt: nothing of the last is left, and its back-off is over. It is made once: Kueue changes it."""
    number = at.number + 1
    attempt = Attempt(name=labels.attempt(at.job.metadata.name, number), started=at.now)
    manifests = objects.attempt(at.job, number, at.gang_choice, at.settings)
    begun = with_costs(with_next_attempt(at, attempt))
    return standing(begun, State.QUEUED, apply=(config(at), *manifests))


def run(at: Situation) -> Decision:
    """The attempt goes on, or comes to be: see that all of it is there, and say how it does."""
    attempt = at.attempt
    is_under_way = attempt is not None and attempt.running is not None
    group = (objects.pod_group(at.job, at.number),) if lacks_pod_group(at) else ()
    return standing(at, State.RUNNING if is_under_way else State.QUEUED, apply=(config(at), *group))


def lacks_pod_group(at: Situation) -> bool:
    """Whether pods wait for a PodGroup that is gone: without one the scheduler leaves them, and does not say so."""
    is_native = at.gang_choice.scheduler is GangScheduler.NATIVE and at.gang_choice.missing is None
    return is_native and at.pod_group is None and any(pod.node is None for pod in at.live_pods)


def end_attempt(at: Situation, cause: Cause) -> Decision:
    """Put the cause on record, then decide whether there is another attempt."""
    if cause.disruption:
        at = at.with_status(disruptions=(at.status.disruptions or 0) + 1)
    elif not cause.permanent:
        at = at.with_status(restarts=(at.status.restarts or 0) + 1)
    final = give_up(cause, at.status.restarts or 0, at.status.disruptions or 0, at.job.spec.lifecycle)
    at = recorded(at, cause)
    if final is not None:
        return fail(at, Cause(cause.reason, final, permanent=True))
    return standing(at, State.RESTARTING, delete=leftovers.of_gangs(at))


def recorded(at: Situation, cause: Cause) -> Situation:
    """The attempt that goes on, ended by this cause; nothing where it had ended before."""
    if at.attempt is None:
        return at
    log = at.observed.logs.get(cause.pod or "")
    ending = {
        "ended": at.now,
        "reason": cause.reason,
        "message": clipped(cause.message, MESSAGE_CHARACTERS),
        "disruption": cause.disruption,
        "checkpoint_step": at.status.checkpoint.step if at.status.checkpoint else None,
        "log": log[-LOG_CHARACTERS:] if log else None,
    }
    return with_attempt(at, at.attempt.model_copy(update=ending))


# ── suspended ──────────────────────────────────────────────────────────────────────────────────────────────────────


def is_stopping(at: Situation) -> bool:
    """Whether an attempt that was told to end by a suspension is still ending, though the job may go on again."""
    is_leaving = at.gang is None or at.gang.deleting
    return at.attempt is not None and is_leaving and at.reason(ConditionType.SUSPENDED) == STOPPING


def suspend(at: Situation) -> Decision:
    """Take the gang down, which commits a checkpoint on its way, and hold still."""
    unprepared = leftovers.of_preparation(at) if leftovers.preparation_runs(at) else ()
    delete = (*leftovers.of_gangs(at), *unprepared)
    if leftovers.gang_exists(at) or leftovers.preparation_runs(at):
        stopping = Verdict("False", STOPPING, "suspending: the pods commit a checkpoint and end")
        better = {ConditionType.SUSPENDED: stopping}
        return standing(at, at.status.state or State.PENDING, delete=delete, better=better)
    at = recorded(at, Cause(SUSPENDED, "spec.suspend was set to true", disruption=None))
    return standing(at, State.SUSPENDED, delete=delete, again=None if at.job.spec.suspend else 0.0)


# ── ends ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def succeed(at: Situation) -> Decision:
    """Everything is trained, committed and exported: the trainer said so after it was."""
    at = recorded(at, Cause("Completed", "trained, committed and exported", disruption=None))
    at = at.with_status(finished=at.now)
    export = f"; the model is at {at.status.export.uri}" if at.status.export else ""
    steps = f"{at.status.progress.total_steps:,} steps" if at.status.progress else "all steps"
    done = Verdict("True", "Completed", f"{steps} trained, and the final checkpoint committed{export}")
    return standing(at, State.SUCCEEDED, better={ConditionType.SUCCEEDED: done})


def fail(at: Situation, cause: Cause) -> Decision:
    """For good: the reason in every place where one looks for it."""
    at = recorded(at, cause).with_status(finished=at.now)
    failed = Verdict("False", cause.reason, cause.message)
    ended = {ConditionType.SUCCEEDED: failed, ConditionType.STALLED: Verdict("True", cause.reason, cause.message)}
    if not is_prepared(at):
        ended[ConditionType.PREPARED] = failed
    return standing(at, State.FAILED, better=ended, delete=leftovers.still_at_work(at))


def clean_up(at: Situation) -> Decision:
    """After the end: nothing may still run, and what is left goes when its time is over."""
    assert at.status.finished is not None
    status = at.status.model_copy(update={"observed_generation": at.job.metadata.generation})
    ttl = at.job.spec.lifecycle.ttl_seconds_after_finished
    left = None if ttl is None else ttl - (at.now - at.status.finished).total_seconds()
    is_over = left is not None and left <= 0
    delete = leftovers.everything(at) if is_over else leftovers.still_at_work(at)
    if delete or leftovers.is_moving(at):
        return Decision(status, delete=delete, again_seconds=POLL_SECONDS)
    return Decision(status, again_seconds=None if is_over else left)


def let_go(at: Situation) -> Decision:
    """The SFTJob is being deleted, and waits for its children. They go; nothing is made or judged any more."""
    delete = leftovers.everything(at)
    return Decision(at.status, delete=delete, again_seconds=POLL_SECONDS)


# ── shared ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def config(at: Situation) -> Manifest:
    return objects.config_map(at.job)


def standing(
    at: Situation,
    state: State,
    *,
    apply: tuple[Manifest, ...] = (),
    delete: tuple[ObjectRef, ...] = (),
    again: float | None = POLL_SECONDS,
    better: Mapping[ConditionType, Verdict] | None = None,
) -> Decision:
    """The decision, with its status put together: the state, and every condition as it is judged there."""
    verdicts = judge(at, state) | dict(better or {})
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
