"""From objects as the API server shows them to the slim projections that decisions rest on. Pure.

What is not ours, or not told in full, is no projection: None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import ValidationError

from sft_api import labels
from sft_api.status import SFTJobStatus
from sft_operator.observed import Ended, Gang, Pod, PodGroup, PrepareJob, Role, Trouble
from sft_operator.pods import CONTAINER

Raw = Mapping[str, Any]
Projection = Pod | PrepareJob | Gang | PodGroup | None

TAKEN_AWAY = frozenset({"Evicted", "NodeLost", "NodeShutdown", "Shutdown", "Terminated", "Preempting"})
"""Reasons of a pod's status by which a node took it away."""
ORDINARY = frozenset({"ContainerCreating", "PodInitializing"})
"""What every container waits for at first."""
GROUP_ANNOTATION = "scheduling.k8s.io/group-name"
GROUP_LABEL = "scheduling.x-k8s.io/pod-group"


class Key(NamedTuple):
    """Which SFTJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Child:
    """One object that was made for an SFTJob."""

    kind: str
    name: str
    uid: str
    version: int
    owner: str | None
    """Uid of the SFTJob that it was made for."""
    is_collected: bool
    """Kubernetes deletes it with what owns it."""
    projection: Projection
    """What is known of it; none for a ConfigMap, of which it is enough that it is there."""


def child(kind: str, raw: Raw) -> Child | None:
    """The object as a child of its SFTJob; none where it is not ours."""
    metadata = raw["metadata"]
    if labels.JOB not in marks(raw):
        return None
    try:
        projection = PROJECTIONS[kind](raw) if kind in PROJECTIONS else None
    except (KeyError, ValueError):  # our labels on an object that we did not make
        return None
    return Child(
        kind=kind,
        name=metadata["name"],
        uid=metadata["uid"],
        version=version(raw),
        owner=marks(raw).get(labels.OWNER_UID),
        is_collected=bool(metadata.get("ownerReferences")),
        projection=projection,
    )


def job_key(kind: str, raw: Raw) -> Key | None:
    """The SFTJob that the object is, or belongs to."""
    metadata = raw["metadata"]
    name = metadata["name"] if kind == "SFTJob" else marks(raw).get(labels.JOB)
    return Key(metadata["namespace"], name) if name else None


def version(raw: Raw) -> int:
    """Of two versions of one object the newer has the greater number."""
    return int(raw["metadata"]["resourceVersion"])


def marks(raw: Raw) -> Mapping[str, str]:
    found: Mapping[str, str] = raw["metadata"].get("labels") or {}
    return found


def job_status(raw: Raw) -> SFTJobStatus:
    """The status of an SFTJob, without the fields that a newer operator has written and this one does not know."""
    given = dict(raw.get("status") or {})
    while True:
        try:
            return SFTJobStatus.model_validate(given)
        except ValidationError as error:
            for found in error.errors():
                given.pop(str(found["loc"][0]), None)


# ── what a gang is made of ─────────────────────────────────────────────────────────────────────────────────────────


def pod(raw: Raw) -> Pod:
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    role = Role(marks(raw)[labels.ROLE])
    placed, main = condition(raw, "PodScheduled"), container_state(status, CONTAINER)
    ended = how_it_ended(main.get("terminated"), metadata)
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        role=role,
        attempt=int(marks(raw)[labels.ATTEMPT]) if role is Role.TRAIN else 0,
        rank=rank(raw),
        phase=status.get("phase", "Pending"),
        created=time(metadata["creationTimestamp"]),
        node=spec.get("nodeName"),
        ip=status.get("podIP"),
        scheduled=since(placed) if placed.get("status") == "True" else None,
        unscheduled=words(placed, "message", "reason") if placed.get("status") == "False" else None,
        disruption=disruption(raw),
        waiting=waits_for(status),
        ended=ended,
        deleting=deleting(raw),
        failed=failed_before_it_ran(status) if ended is None else None,
        in_pod_group=is_in_pod_group(raw),
        owner=marks(raw).get(labels.OWNER_UID),
    )


def rank(raw: Raw) -> int:
    """A pod's place in the gang, from the training operator's labels."""
    given = marks(raw)
    if given.get("training.kubeflow.org/replica-type", "").lower() != "worker":
        return 0
    return int(given["training.kubeflow.org/replica-index"]) + 1


def is_in_pod_group(raw: Raw) -> bool:
    annotations = raw["metadata"].get("annotations") or {}
    native = (raw.get("spec") or {}).get("schedulingGroup")
    return bool(native or annotations.get(GROUP_ANNOTATION) or marks(raw).get(GROUP_LABEL))


def how_it_ended(terminated: Raw | None, metadata: Raw) -> Ended | None:
    """How a container ended. Where its kubelet lost sight of it, it left no time: then the pod's creation is it."""
    if terminated is None:
        return None
    finished = terminated.get("finishedAt") or terminated.get("startedAt") or metadata["creationTimestamp"]
    return Ended(
        exit_code=terminated["exitCode"],
        reason=terminated.get("reason", ""),
        message=terminated.get("message", ""),
        finished=time(finished),
    )


def disruption(raw: Raw) -> str | None:
    """Why Kubernetes takes the pod away, or did; none where it does not."""
    target, status = condition(raw, "DisruptionTarget"), raw.get("status") or {}
    if target.get("status") == "True":
        return words(target, "reason", "message")
    return words(status, "reason", "message") if status.get("reason") in TAKEN_AWAY else None


def waits_for(status: Raw) -> str | None:
    """What the first container that does not come to run waits for; none for what every container waits for."""
    for kind in ("initContainerStatuses", "containerStatuses"):
        for found in status.get(kind) or []:
            waiting = (found.get("state") or {}).get("waiting") or {}
            if waiting and (waiting.get("reason") not in ORDINARY or waiting.get("message")):
                return words(waiting, "reason", "message")
    return None


def failed_before_it_ran(status: Raw) -> str | None:
    """Why the pod failed though its main container never ran; none where it did not fail."""
    if status.get("phase") != "Failed" or status.get("reason") in TAKEN_AWAY:
        return None
    for found in status.get("initContainerStatuses") or []:
        terminated = (found.get("state") or {}).get("terminated") or {}
        if terminated.get("exitCode"):
            ending = f"init container {found['name']} ended with exit code {terminated['exitCode']}"
            return ": ".join(part for part in (ending, terminated.get("message", "").strip()) if part)
    return words(status, "reason", "message") or "it failed, and its node does not say why"


def container_state(status: Raw, name: str) -> Raw:
    for found in status.get("containerStatuses") or []:
        if found["name"] == name:
            state: Raw = found.get("state") or {}
            return state
    return {}


def gang(raw: Raw) -> Gang:
    failed, succeeded = condition(raw, "Failed"), condition(raw, "Succeeded")
    has_failed, has_succeeded = failed.get("status") == "True", succeeded.get("status") == "True"
    over = failed if has_failed else succeeded if has_succeeded else {}
    policy = (raw.get("spec") or {}).get("runPolicy") or {}
    return Gang(
        name=raw["metadata"]["name"],
        uid=raw["metadata"]["uid"],
        attempt=int(marks(raw)[labels.ATTEMPT]),
        created=time(raw["metadata"]["creationTimestamp"]),
        failed=words(failed, "message", "reason") if has_failed else None,
        succeeded=has_succeeded,
        ended=since(over) if over else None,
        queued=bool(policy.get("suspend")),
        deleting=deleting(raw) is not None,
        owner=marks(raw).get(labels.OWNER_UID),
    )


def prepare_job(raw: Raw) -> PrepareJob:
    failed = condition(raw, "Failed")
    return PrepareJob(
        name=raw["metadata"]["name"],
        uid=raw["metadata"]["uid"],
        complete=condition(raw, "Complete").get("status") == "True",
        failed=words(failed, "reason", "message") if failed.get("status") == "True" else None,
        deleting=deleting(raw) is not None,
        owner=marks(raw).get(labels.OWNER_UID),
    )


def pod_group(raw: Raw) -> PodGroup:
    placed = condition(raw, "PodGroupInitiallyScheduled")
    return PodGroup(
        name=raw["metadata"]["name"],
        uid=raw["metadata"]["uid"],
        scheduled=placed.get("status") == "True",
        message=(words(placed, "message", "reason") or "") if placed.get("status") == "False" else "",
        deleting=deleting(raw) is not None,
        owner=marks(raw).get(labels.OWNER_UID),
    )


PROJECTIONS: Mapping[str, Callable[[Raw], Projection]] = {
    "Pod": pod,
    "PyTorchJob": gang,
    "Job": prepare_job,
    "PodGroup": pod_group,
}


def troubles(events: Iterable[Raw]) -> tuple[Trouble, ...]:
    """What Warning events say, the newest last."""
    newest_last = sorted(events, key=lambda raw: str(raw.get("lastTimestamp") or raw.get("eventTime") or ""))
    return tuple(Trouble(raw.get("reason") or "Warning", raw.get("message") or "") for raw in newest_last)


# ── shared ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def condition(raw: Raw, kind: str) -> Raw:
    """The condition of this type; an empty one where there is none."""
    return next((found for found in conditions(raw) if found.get("type") == kind), {})


def conditions(raw: Raw) -> Iterator[Raw]:
    yield from (raw.get("status") or {}).get("conditions") or []


def since(found: Raw) -> datetime | None:
    """When the condition came to be as it is, where its author says so."""
    given = found.get("lastTransitionTime")
    return time(given) if given else None


def deleting(raw: Raw) -> datetime | None:
    given = raw["metadata"].get("deletionTimestamp")
    return time(given) if given else None


def words(found: Raw, first: str, second: str) -> str | None:
    """`reason: message`, or `message` where that comes first: the other only where it is missing."""
    parts = [str(found[name]).strip() for name in (first, second) if found.get(name)]
    if not parts:
        return None
    return parts[0] if first == "message" else ": ".join(parts)


def time(text: str) -> datetime:
    return datetime.fromisoformat(text)
