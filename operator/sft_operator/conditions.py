"""What each condition of a job says in each situation: status, reason, and a message for a person on call. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sft_api.pods import GangScheduler
from sft_api.status import Condition, ConditionType, PlanStatus, State
from sft_operator.gang import OUTSIDE
from sft_operator.observed import Pod
from sft_operator.restart import reason_in, words
from sft_operator.situation import Situation

MESSAGE_CHARACTERS = 4096
REASON_CHARACTERS = 128
Truth = Literal["True", "False", "Unknown"]
RESTRICTED = (
    "the namespace enforces the restricted Pod Security Standard, and the training operator's init container does not"
    " pass it: give the training operator an initContainer.yaml with a securityContext (docs/install.md)"
)


@dataclass(frozen=True)
class Verdict:
    """What one condition is to say."""

    status: Truth
    reason: str
    message: str


Verdicts = Mapping[ConditionType, Verdict]


def conditions(old: Sequence[Condition], verdicts: Verdicts, generation: int | None, now: datetime) -> list[Condition]:
    """The list for the status: each in its fixed place, with the time at which its status last changed."""
    before = {condition.type: condition for condition in old}
    result = []
    for kind in ConditionType:
        verdict = verdicts[kind]
        known = before.get(kind)
        unchanged = known is not None and known.status == verdict.status
        result.append(
            Condition(
                type=kind.value,
                status=verdict.status,
                observed_generation=generation,
                last_transition_time=known.last_transition_time if known and unchanged else now,
                reason=as_reason(verdict.reason),
                message=clipped(verdict.message, MESSAGE_CHARACTERS),
            )
        )
    return result


def clipped(text: str, characters: int) -> str:
    """`text`, or its beginning where it is longer than a status may say."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def as_reason(word: str) -> str:
    """`word` as the API server takes it: the reasons of events come from others, and are not always one word."""
    letters = re.sub(r"[^A-Za-z0-9]", "", word).lstrip("0123456789")
    return letters[:REASON_CHARACTERS] or "Unknown"


def judge(at: Situation, state: State) -> dict[ConditionType, Verdict]:
    """Every condition, as the state of the job and its pods have it; a decision may know one of them better."""
    return {
        ConditionType.PREPARED: prepared(at, state),
        ConditionType.GANG_SCHEDULED: gang_scheduled(at, state),
        ConditionType.RUNNING: running(at, state),
        ConditionType.SUSPENDED: suspended(state),
        ConditionType.CHECKPOINT_HEALTHY: checkpoint_healthy(at),
        ConditionType.SUCCEEDED: Verdict("Unknown", "InProgress", "the job has not ended"),
        ConditionType.STALLED: Verdict("False", "NotStalled", "nothing has ended the job for good"),
        ConditionType.RECONCILING: reconciling(at, state),
    }


def prepared(at: Situation, state: State) -> Verdict:
    if at.holds(ConditionType.PREPARED) or (at.observed.prepare and at.observed.prepare.complete):
        return Verdict("True", "Prepared", prepared_words(at.status.plan))
    if state is not State.PREPARING:
        return Verdict("False", "NotStarted", "the data is not prepared yet")
    if at.prepare_pods:
        return preparing(at.prepare_pods[-1])
    if troubles := at.observed.troubles:
        return Verdict("False", troubles[-1].reason, troubles[-1].message)
    return Verdict("False", "Preparing", "the preparation is about to start")


def preparing(pod: Pod) -> Verdict:
    """How the newest of the preparation's pods does."""
    if blocked := hindrance(pod):
        return Verdict("False", "Waiting", f"pod {pod.name}: {blocked}")
    if pod.ended is not None and pod.ended.exit_code != 0:
        return Verdict("False", "Retrying", f"pod {pod.name} ended with {reason_in(pod.ended)}: {words(pod)}")
    return Verdict("False", "Preparing", f"pod {pod.name} prepares the data")


def prepared_words(plan: PlanStatus | None) -> str:
    if plan is None:
        return "the data is prepared"
    steps = sum(phase.steps for phase in plan.phases)
    return f"{plan.samples:,} samples of {plan.tokens:,} tokens" + (f", {steps:,} steps" if steps else "")


def hindrance(pod: Pod) -> str | None:
    """What keeps a pod from running; none where nothing does."""
    if pod.phase != "Pending":
        return None
    return pod.unscheduled or pod.waiting


def gang_scheduled(at: Situation, state: State) -> Verdict:
    choice = at.gang_choice
    if at.attempt is None:
        if choice.missing is not None:
            asked = f"spec.scheduling.gang is {at.job.spec.scheduling.gang}"
            return Verdict("False", "SchedulerMissing", f"{asked}: {choice.missing}")
        when = "yet" if at.last_attempt is None else "now"
        return Verdict("False", "NoPods", f"no pods {when}: the job is {state.value}; {choice.why}")
    placed = [pod for pod in at.live_pods if pod.node]
    if choice.scheduler in OUTSIDE and (outside := [pod.name for pod in at.live_pods if not pod.in_pod_group]):
        return Verdict("False", "NotInPodGroup", f"{outside[0]} {OUTSIDE[choice.scheduler]}")
    if len(placed) < at.nodes:
        return waiting_for_nodes(at, len(placed))
    where = ", ".join(sorted({pod.node for pod in placed if pod.node}))
    message = f"{at.nodes} of {at.nodes} pods placed on {where}; {choice.why}"
    return Verdict("True", choice.scheduler.value, message) if choice.is_a_gang else Verdict("False", "NoGang", message)


def waiting_for_nodes(at: Situation, placed: int) -> Verdict:
    """Why not all pods have a node."""
    choice, count = at.gang_choice, f"{placed} of {at.nodes} pods placed"
    if at.gang is not None and at.gang.queued:
        return Verdict("False", "Queued", f"waits in the queue {at.job.spec.scheduling.queue}")
    pending = [pod for pod in at.live_pods if not pod.node]
    if choice.scheduler is GangScheduler.NATIVE and pending and at.pod_group is None:
        lacking = f"PodGroup {at.attempt_name} was gone, without which they wait unsaid; it is made anew"
        return Verdict("False", "PodGroupMissing", f"{count}: {lacking}")
    if choice.scheduler is GangScheduler.NATIVE and at.pod_group is not None and at.pod_group.message:
        return Verdict("False", "Unschedulable", f"{count}: {at.pod_group.message}; {choice.why}")
    if unscheduled := [pod for pod in pending if pod.unscheduled]:
        first = f"{unscheduled[0].name}: {unscheduled[0].unscheduled}"
        return Verdict("False", "Unschedulable", f"{count}; {first}; {choice.why}")
    return Verdict("False", "Waiting", f"{count}; {choice.why}")


def running(at: Situation, state: State) -> Verdict:
    if at.attempt is not None and at.attempt.running is not None:
        return Verdict("True", "Running", running_words(at))
    if state is State.QUEUED:
        return not_yet_running(at)
    last = at.last_attempt
    if state is State.RESTARTING and last is not None:
        ended = f"{last.name} ended ({last.reason}): {last.message}"
        due = "the next attempt begins when the pods of this one are gone and the back-off is over"
        return Verdict("False", state.value, f"{due}; {ended}")
    return Verdict("False", state.value, f"no pods of the gang run: the job is {state.value}")


def running_words(at: Situation) -> str:
    count = f"{num_running(at)} of {at.nodes} pods run, attempt {at.number}"
    report = at.report
    return count if report is not None and report.progress else f"{count}; the first step is not taken yet"


def num_running(at: Situation) -> int:
    return sum(pod.is_running for pod in at.pods)


def not_yet_running(at: Situation) -> Verdict:
    """What the slowest of the pods waits for."""
    count = f"{num_running(at)} of {at.nodes} pods run"
    if troubles := at.observed.troubles:
        newest = troubles[-1]
        if newest.reason == "FailedCreatePod" and "violates PodSecurity" in newest.message:
            return Verdict("False", "PodSecurity", f"{count}: {RESTRICTED}. The API server's words: {newest.message}")
        return Verdict("False", newest.reason, f"{count}: {newest.message}")
    for pod in at.live_pods:
        if blocked := hindrance(pod):
            return Verdict("False", "Waiting", f"{count}; {pod.name}: {blocked}")
    return Verdict("False", "Starting", count)


def suspended(state: State) -> Verdict:
    if state is State.SUSPENDED:
        return Verdict("True", "Suspended", "spec.suspend is true: no pods run; set it to false to go on")
    return Verdict("False", "NotSuspended", "the job is not suspended")


def checkpoint_healthy(at: Situation) -> Verdict:
    checkpoint = at.status.checkpoint
    if at.report is not None and at.report.checkpoint_problem:
        return Verdict("False", "SaveFailing", at.report.checkpoint_problem)
    if checkpoint is None:
        return Verdict("Unknown", "NoneYet", "no checkpoint is committed yet")
    verified = ", read back and whole" if checkpoint.verified else ""
    return Verdict("True", "Committed", f"step {checkpoint.step:,} is committed{verified}: {checkpoint.uri}")


def reconciling(at: Situation, state: State) -> Verdict:
    if state is not State.PENDING:
        return Verdict("False", "Accepted", "the operator waits for pods, or has nothing to do")
    if at.gang_choice.missing is not None:
        return Verdict("True", "SchedulerMissing", at.gang_choice.missing)
    return Verdict("True", "Accepting", "the operator sets the job up")
