"""Who places the pods of a gang, all or none: which scheduler a job gets on this cluster, and what that asks of pods.

Pure. `objects` writes what is decided here into manifests, `conditions` says it in GangScheduled.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_api.pods import GangScheduler, Scheduling
from sft_operator.observed import Platform

GROUPS = {
    GangScheduler.VOLCANO: "scheduling.volcano.sh",
    GangScheduler.COSCHEDULING: "scheduling.x-k8s.io",
    GangScheduler.KUEUE: "kueue.x-k8s.io",
    GangScheduler.KAI: "scheduling.run.ai",
}
"""The API group by which a scheduler that is not Kubernetes' own shows itself."""

SCHEDULER_NAMES = {
    GangScheduler.VOLCANO: "volcano",
    GangScheduler.COSCHEDULING: "scheduler-plugins-scheduler",
    GangScheduler.KAI: "kai-scheduler",
}
"""The schedulerName that each asks of its pods, unless the job gives another."""

NO_POD_GROUPS = (
    "the API server serves no scheduling.k8s.io/v1beta1 PodGroups: they need Kubernetes 1.37 or later with the feature"
    " gate GenericWorkload on API server, controller manager and scheduler, and --runtime-config="
    "scheduling.k8s.io/v1beta1=true"
)
NO_POLICY = (
    "the MutatingAdmissionPolicy sftjob-gang of our chart, which puts pods into their PodGroup, is not installed:"
    " set gang.native.admissionPolicy=true in the chart's values"
)
NATIVE_GANG = "a gang of Kubernetes' own scheduler, as one PodGroup"
OUTSIDE = {
    GangScheduler.NATIVE: "is in no PodGroup: the policy sftjob-gang did not reach it",
    GangScheduler.VOLCANO: "is in no PodGroup: start the training operator with --gang-scheduler-name=volcano",
    GangScheduler.COSCHEDULING: (
        "is in no PodGroup: start the training operator with --gang-scheduler-name=scheduler-plugins-scheduler"
    ),
}
"""Why a pod of such a gang is placed by itself, and what to do; for the schedulers whose pods show it."""


@dataclass(frozen=True)
class GangChoice:
    """Who places a job's gang here."""

    scheduler: GangScheduler
    """Never Auto."""
    why: str
    """In a sentence, for GangScheduled."""
    missing: str | None = None
    """What the cluster lacks for it; the gang is not started without."""

    @property
    def is_a_gang(self) -> bool:
        return self.scheduler is not GangScheduler.NONE


def choose_gang(scheduling: Scheduling, nodes: int, platform: Platform) -> GangChoice:
    """The scheduler asked for; with Auto, Kubernetes' own where it is to be had and there is more than one pod."""
    asked = scheduling.gang
    native_lacks = missing_native(platform)
    if asked is GangScheduler.AUTO and nodes == 1:
        return GangChoice(GangScheduler.NONE, "no gang: one pod needs none")
    if asked is GangScheduler.AUTO and native_lacks is not None:
        return GangChoice(GangScheduler.NONE, f"no gang: spec.scheduling.gang is Auto, and {native_lacks}")
    if asked in (GangScheduler.AUTO, GangScheduler.NATIVE):
        return GangChoice(GangScheduler.NATIVE, NATIVE_GANG, native_lacks)
    if asked is GangScheduler.NONE:
        return GangChoice(GangScheduler.NONE, "no gang: spec.scheduling.gang is None")
    group = GROUPS[asked]
    lacks = None if group in platform.groups else f"the API server serves no {group}: install {asked}"
    return GangChoice(asked, f"a gang of {asked}", lacks)


def missing_native(platform: Platform) -> str | None:
    """What Kubernetes' own gang scheduling lacks here; none where it is complete."""
    if not platform.pod_groups:
        return NO_POD_GROUPS
    return None if platform.gang_policy else NO_POLICY


def scheduler_name(scheduling: Scheduling, choice: GangChoice) -> str | None:
    return scheduling.scheduler_name or SCHEDULER_NAMES.get(choice.scheduler)
