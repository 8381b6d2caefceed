"""What each condition of a job says in each situation: status, reason, and a message for a person on call. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sft_api.pods import GangScheduler
from sft_api.status import Condition, ConditionType, PlanStatus, State
from sft_operator.observed import Pod
from sft_operator.situation import Situation

MESSAGE_CHARACTERS = 4096
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
                reason=verdict.reason,
                message=verdict.message[:MESSAGE_CHARACTERS],
            )
        )
    return result


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
        ConditionType.RECONCILING: reconciling(state),
    }


def prepared(at: Situation, state: State) -> Verdict:
    if at.holds(ConditionType.PREPARED) or (at.observed.prepare and at.observed.prepare.complete):
        return Verdict("True", "Prepared", prepared_words(at.status.plan))
    if state is not State.PREPARING:
        return Verdict("False", "NotStarted", "the data is not prepared yet")
    for pod in reversed(at.prepare_pods):
        if blocked := hindrance(pod):
            return Verdict("False", "Waiting", f"pod {pod.name}: {blocked}")
        if pod.is_running:
            return Verdict("False", "Preparing", f"pod {pod.name} prepares the data")
    if at.observed.troubles:
        return Verdict("False", at.observed.troubles[-1].reason, at.observed.troubles[-1].message)
    return Verdict("False", "Preparing", "the preparation is about to start")


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
    if choice.missing is not None:
        return Verdict(
            "False", "SchedulerMissing", f"spec.scheduling.gang is {at.job.spec.scheduling.gang}: {choice.missing}"
        )
    if at.attempt is None:
        when = "yet" if at.last_attempt is None else "now"
        return Verdict("False", "NoPods", f"no pods {when}: the job is {state.value}; {choice.why}")
    placed = [pod for pod in at.live_pods if pod.node]
    if len(placed) == at.nodes:
        where = ", ".join(sorted({pod.node for pod in placed if pod.node}))
        together = f"{at.nodes} of {at.nodes} pods placed on {where}; {choice.why}"
        return Verdict(
            "True" if choice.is_a_gang else "False", choice.scheduler.value if choice.is_a_gang else "NoGang", together
        )
    return waiting_for_nodes(at, len(placed))


def waiting_for_nodes(at: Situation, placed: int) -> Verdict:
    """Why not all pods have a node."""
    choice, count = at.gang_choice, f"{placed} of {at.nodes} pods placed"
    if at.gang is not None and at.gang.queued:
        return Verdict("False", "Queued", f"waits in the queue {at.job.spec.scheduling.queue}")
    pending = [pod for pod in at.live_pods if not pod.node]
    if choice.scheduler is GangScheduler.NATIVE:
        if outside := [pod.name for pod in pending if not pod.in_pod_group]:
            return Verdict(
                "False", "NotInPodGroup", f"{outside[0]} is in no PodGroup: the policy sftjob-gang did not reach it"
            )
        if pending and at.pod_group is None:
            return Verdict(
                "False", "PodGroupMissing", f"{count}: PodGroup {at.attempt_name} does not exist, so they wait unsaid"
            )
        if at.pod_group is not None and at.pod_group.message:
            return Verdict("False", "Unschedulable", f"{count}: {at.pod_group.message}")
    if unscheduled := [pod for pod in pending if pod.unscheduled]:
        return Verdict(
            "False", "Unschedulable", f"{count}; {unscheduled[0].name}: {unscheduled[0].unscheduled}; {choice.why}"
        )
    return Verdict("False", "Waiting", f"{count}; {choice.why}")


def running(at: Situation, state: State) -> Verdict:
    if state is State.RUNNING:
        return Verdict("True", "Running", running_words(at))
    if state is State.QUEUED:
        return not_yet_running(at)
    return Verdict("False", state.value, f"no pods of the gang run: the job is {state.value}")


def running_words(at: Situation) -> str:
    progress = at.status.progress
    if at.report is None or at.report.progress is None or progress is None:
        return f"{at.nodes} of {at.nodes} pods run; the first step is not taken yet"
    return f"{at.nodes} of {at.nodes} pods run, attempt {at.number}"


def not_yet_running(at: Situation) -> Verdict:
    """What the slowest of the pods waits for."""
    count = f"{sum(pod.is_running for pod in at.pods)} of {at.nodes} pods run"
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
    return Verdict("False", "NotSuspended", "spec.suspend is false, or the pods are still on their way out")


def checkpoint_healthy(at: Situation) -> Verdict:
    checkpoint = at.status.checkpoint
    if at.report is not None and at.report.checkpoint_problem:
        return Verdict("False", "SaveFailing", at.report.checkpoint_problem)
    if checkpoint is None:
        return Verdict("Unknown", "NoneYet", "no checkpoint is committed yet")
    verified = ", read back and whole" if checkpoint.verified else ""
    return Verdict("True", "Committed", f"step {checkpoint.step:,} is committed{verified}: {checkpoint.uri}")


def reconciling(state: State) -> Verdict:
    if state is State.PENDING:
        return Verdict("True", "Accepting", "the operator sets the job up")
    return Verdict("False", "Accepted", "the operator waits for pods, or has nothing to do")
