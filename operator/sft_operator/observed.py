"""What the operator knows of a job's world: slim projections of Kubernetes objects, and what it decides to do about it.

Plain values, made by `views` from objects of the API server and by tests by hand. Nothing here talks to anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from sft_api.report import TrainerReport
from sft_api.status import SFTJobStatus

Manifest = Mapping[str, Any]


class Role(StrEnum):
    """What a pod of ours is for: the value of its role label."""

    PREPARE = "prepare"
    TRAIN = "train"


@dataclass(frozen=True)
class Ended:
    """How a pod's container ended."""

    exit_code: int
    reason: str
    """The kubelet's word: Completed, Error, OOMKilled, …"""
    message: str
    """The termination message as the container left it; empty where it left none."""
    finished: datetime


@dataclass(frozen=True)
class Pod:
    """One of a job's pods."""

    name: str
    uid: str
    role: Role
    attempt: int
    """The attempt it belongs to; 0 for a prepare pod."""
    rank: int
    """Its place in the gang: 0 is the master's; workers follow."""
    phase: str
    """Pending, Running, Succeeded, Failed or Unknown."""
    created: datetime
    node: str | None = None
    ip: str | None = None
    scheduled: datetime | None = None
    """When it was placed on its node."""
    unscheduled: str | None = None
    """Why it is on no node, in the scheduler's words."""
    disruption: str | None = None
    """Why Kubernetes takes it away (eviction, preemption, lost node, shutdown), in its words."""
    waiting: str | None = None
    """What its container or an init container waits for, reason first: `ImagePullBackOff: …`."""
    ended: Ended | None = None
    """How its main container ended."""
    deleting: datetime | None = None
    """Its deletionTimestamp: when it should be gone at the latest."""
    failed: str | None = None
    """Why it failed as a whole, its main container never having run: refused by its node, an init container."""
    in_pod_group: bool = False
    """Whether a scheduler places it together with the others: it has a schedulingGroup, Volcano's annotation
    `scheduling.k8s.io/group-name` or Coscheduling's label `scheduling.x-k8s.io/pod-group`."""
    gone: bool = False
    """It is deleted; what it said last is kept until the next attempt."""
    owner: str | None = None
    """As everywhere here: uid of the SFTJob that it was made for, from the label; none where it has no such label."""

    @property
    def is_running(self) -> bool:
        return self.phase == "Running" and self.ended is None and not self.gone


@dataclass(frozen=True)
class PrepareJob:
    """The Job that prepares the data."""

    name: str
    uid: str
    complete: bool = False
    failed: str | None = None
    """Why it failed for good, in the words of its condition."""
    deleting: bool = False
    owner: str | None = None


@dataclass(frozen=True)
class Gang:
    """The object that makes an attempt's pods (a PyTorchJob)."""

    name: str
    uid: str
    attempt: int
    created: datetime
    failed: str | None = None
    """Why it failed, in the words of its condition."""
    succeeded: bool = False
    ended: datetime | None = None
    """When it failed or succeeded. What its pods say of it may be seen a little later."""
    queued: bool = False
    """A queue holds it back (Kueue suspends what it has not admitted)."""
    deleting: bool = False
    owner: str | None = None


@dataclass(frozen=True)
class PodGroup:
    """The gang as Kubernetes' own scheduler knows it."""

    name: str
    uid: str
    scheduled: bool = False
    message: str = ""
    """Why it is not scheduled, in the scheduler's words."""
    deleting: bool = False
    owner: str | None = None


@dataclass(frozen=True)
class Trouble:
    """A Warning event about one of our objects that has no pod to tell."""

    reason: str
    message: str


@dataclass(frozen=True)
class Platform:
    """What the cluster offers, as its API server tells."""

    pod_groups: bool = False
    """scheduling.k8s.io/v1beta1 PodGroups are served."""
    gang_policy: bool = False
    """The admission policy of our chart that puts pods into their PodGroup is installed."""
    groups: frozenset[str] = frozenset()
    """The API groups that are served."""


@dataclass(frozen=True)
class Observed:
    """Everything that `reconcile` may know besides the job itself."""

    platform: Platform = Platform()
    prepare: PrepareJob | None = None
    gangs: tuple[Gang, ...] = ()
    pod_groups: tuple[PodGroup, ...] = ()
    pods: tuple[Pod, ...] = ()
    has_config: bool = False
    """The ConfigMap with run.json is there."""
    report: TrainerReport | None = None
    """What the gang's first rank answered just now; none where it did not."""
    troubles: tuple[Trouble, ...] = ()
    """Warnings about the newest attempt, the newest last, where pods are missing."""
    logs: Mapping[str, str] = field(default_factory=dict)
    """Last lines of the logs of pods that failed, by pod."""
    lost_nodes: frozenset[str] = frozenset()
    """Nodes of our terminating pods that do not answer the control plane."""


@dataclass(frozen=True)
class ObjectRef:
    """An object to be deleted."""

    kind: str
    name: str
    uid: str | None = None
    """Delete this one only, not a namesake."""
    force: bool = False
    """Do not wait for its node to confirm: for pods of nodes that are gone."""


@dataclass(frozen=True)
class Decision:
    """What should be true next. Carrying it out twice is the same as carrying it out once.

    In this order: `apply`, then `status`, then `delete`: a cause is on record before what showed it goes.
    """

    status: SFTJobStatus
    apply: tuple[Manifest, ...] = ()
    delete: tuple[ObjectRef, ...] = ()
    again_seconds: float | None = None
    """Look again after so long, though nothing changes."""
