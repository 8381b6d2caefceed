"""What of a job's objects is to go: after an attempt, at the end, and what an earlier job of its name left. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from sft_api import labels
from sft_operator.observed import ObjectRef, Observed, Pod
from sft_operator.situation import Situation

LATE = timedelta(seconds=30)
"""How long past its time a terminating pod is waited for: no kubelet will report it any more."""
TEARDOWN = timedelta(seconds=60)
"""How long a gang that is about to end is left to it: the training operator keeps the pods that have ended."""


def gang_exists(at: Situation) -> bool:
    """Whether anything of the attempts so far is there that could still run."""
    return bool(at.observed.gangs) or any(pod.attempt and not pod.gone for pod in at.observed.pods)


def of_gangs(at: Situation) -> tuple[ObjectRef, ...]:
    """What is to be deleted of the attempts so far: gangs once, pods only where nobody else will, PodGroups last."""
    gangs = [ObjectRef("PyTorchJob", gang.name, gang.uid) for gang in at.observed.gangs if not gang.deleting]
    groups = [ObjectRef("PodGroup", group.name, group.uid) for group in at.observed.pod_groups if not group.deleting]
    return (*gangs, *orphans(at), *stuck_pods(at), *(() if gang_exists(at) else groups))


def orphans(at: Situation) -> tuple[ObjectRef, ...]:
    """Pods whose gang was deleted without them: nobody else will stop them."""
    made = {gang.attempt for gang in at.observed.gangs}
    return tuple(
        ObjectRef("Pod", pod.name, pod.uid)
        for pod in at.observed.pods
        if pod.attempt and pod.attempt not in made and pod.deleting is None and not pod.gone
    )


def stuck_pods(at: Situation) -> tuple[ObjectRef, ...]:
    """Terminating pods of gangs that no kubelet will confirm gone."""
    return tuple(
        ObjectRef("Pod", pod.name, pod.uid, force=True)
        for pod in at.observed.pods
        if pod.attempt and not pod.gone and is_stuck(at, pod)
    )


def is_stuck(at: Situation, pod: Pod) -> bool:
    """Whether its node is lost, or the time that Kubernetes itself gave it is long over."""
    if pod.deleting is None:
        return False
    return pod.node in at.observed.lost_nodes or at.now > pod.deleting + LATE


def of_preparation(at: Situation) -> tuple[ObjectRef, ...]:
    job = at.observed.prepare
    return (ObjectRef("Job", job.name, job.uid),) if job is not None and not job.deleting else ()


def preparation_runs(at: Situation) -> bool:
    job = at.observed.prepare
    return job is not None and not job.complete and job.failed is None


def still_at_work(at: Situation) -> tuple[ObjectRef, ...]:
    """What would go on though the job has ended."""
    gangs = stuck_pods(at) if ends_by_itself(at) else of_gangs(at)
    return (*gangs, *(of_preparation(at) if preparation_runs(at) else ()))


def ends_by_itself(at: Situation) -> bool:
    """Whether the training operator takes away what still runs, and leaves the pods that have ended with their logs."""
    if at.gang is None:
        return not gang_exists(at)
    if at.gang.failed or at.gang.succeeded:
        return True
    is_ending = any(pod.ended for pod in at.pods) or (at.report is not None and at.report.complete)
    return is_ending and at.status.finished is not None and at.now - at.status.finished < TEARDOWN


def is_moving(at: Situation) -> bool:
    """Whether something is on its way out, or about to be, and may get stuck there."""
    pods = [pod for pod in at.observed.pods if pod.attempt and not pod.gone]
    return any(gang.deleting for gang in at.observed.gangs) or any(pod.deleting or pod.is_running for pod in pods)


def everything(at: Situation) -> tuple[ObjectRef, ...]:
    """All children that are still there."""
    name = labels.config_map(at.job.metadata.name)
    config_map = (ObjectRef("ConfigMap", name),) if at.observed.has_config else ()
    return (*of_gangs(at), *of_preparation(at), *config_map)


# ── a namesake: an earlier job of the same name, deleted, whose objects are still on their way out ─────────────────


def own(observed: Observed, uid: str | None) -> Observed:
    """What was observed, without what was made for a namesake."""
    return only(observed, lambda owner: owner is None or owner == uid)


def namesakes(observed: Observed, uid: str | None) -> Observed:
    """What was made for a namesake alone."""
    return only(observed, lambda owner: owner is not None and owner != uid)


def only(observed: Observed, wanted: Callable[[str | None], bool]) -> Observed:
    """The objects of wanted owners."""
    prepare = observed.prepare
    return replace(
        observed,
        prepare=prepare if prepare is not None and wanted(prepare.owner) else None,
        gangs=tuple(gang for gang in observed.gangs if wanted(gang.owner)),
        pod_groups=tuple(group for group in observed.pod_groups if wanted(group.owner)),
        pods=tuple(pod for pod in observed.pods if wanted(pod.owner)),
    )


def anything_exists(at: Situation) -> bool:
    """Whether there is anything under names that a job uses, but for its ConfigMap."""
    return gang_exists(at) or at.observed.prepare is not None or bool(at.observed.pod_groups)
