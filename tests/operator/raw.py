"""Objects as the API server shows them, in little: each builder gives the smallest one that is ours."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from sft_api import labels

UID = "uid-of-lab"
MADE = "2026-11-24T12:00:00Z"
LATER = "2026-11-24T12:00:30Z"
_versions = itertools.count(1)

Raw = dict[str, Any]


def metadata(name: str, role: Mapping[str, str], **fields: Any) -> Raw:
    ours = {labels.JOB: "lab", labels.OWNER_UID: UID, labels.MANAGED_BY: labels.MANAGER}
    return {
        "name": name,
        "namespace": "team",
        "uid": f"uid-of-{name}",
        "resourceVersion": str(next(_versions)),
        "creationTimestamp": MADE,
        "labels": ours | dict(role),
        "ownerReferences": [{"kind": "SFTJob", "name": "lab", "uid": UID}],
    } | fields


def job(**fields: Any) -> Raw:
    meta = metadata("lab", {}, uid=UID, generation=1, **fields)
    del meta["labels"], meta["ownerReferences"]
    return {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": meta, "spec": {}}


def pod(
    rank: int = 0, attempt: int = 1, *, status: Mapping[str, Any] | None = None, spec: Raw | None = None, **fields: Any
) -> Raw:
    """A pod of the gang as the training operator makes it, on no node yet."""
    replica = ("master", "0") if rank == 0 else ("worker", str(rank - 1))
    role = {
        labels.ROLE: "train",
        labels.ATTEMPT: str(attempt),
        "training.kubeflow.org/replica-type": replica[0],
        "training.kubeflow.org/replica-index": replica[1],
    }
    name = f"lab-{attempt}-{replica[0]}-{replica[1]}"
    return {
        "metadata": metadata(name, role, **fields),
        "spec": {"containers": [{"name": "pytorch"}], **(spec or {})},
        "status": {"phase": "Pending", **(status or {})},
    }


def running(rank: int = 0, attempt: int = 1, **fields: Any) -> Raw:
    placed = {"type": "PodScheduled", "status": "True", "lastTransitionTime": LATER}
    state = {"running": {"startedAt": LATER}}
    status = {"phase": "Running", "podIP": "10.0.0.1", "conditions": [placed], "containerStatuses": [container(state)]}
    return pod(rank, attempt, status=status, spec={"nodeName": "node-1"}, **fields)


def ended(code: int, rank: int = 0, attempt: int = 1, *, message: str = "", reason: str = "", **fields: Any) -> Raw:
    how = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "finishedAt": LATER}
    terminated = {"terminated": how | ({"message": message} if message else {})}
    status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [container(terminated)]}
    return pod(rank, attempt, status=status, spec={"nodeName": "node-1"}, **fields)


def container(state: Raw, name: str = "pytorch") -> Raw:
    return {"name": name, "state": state}


def gang(attempt: int = 1, conditions: list[Raw] | None = None, spec: Raw | None = None, **fields: Any) -> Raw:
    role = {labels.ROLE: "train", labels.ATTEMPT: str(attempt)}
    status = {"status": {"conditions": conditions}} if conditions is not None else {}
    return {"metadata": metadata(f"lab-{attempt}", role, **fields), "spec": spec or {}, **status}


def prepare_job(conditions: list[Raw] | None = None, **fields: Any) -> Raw:
    role = {labels.ROLE: "prepare", labels.ATTEMPT: "0"}
    return {"metadata": metadata("lab-prepare", role, **fields), "status": {"conditions": conditions}}


def pod_group(attempt: int = 1, conditions: list[Raw] | None = None, **fields: Any) -> Raw:
    role = {labels.ATTEMPT: str(attempt)}
    return {
        "metadata": metadata(f"lab-{attempt}", role, uid=f"group-{attempt}", **fields),
        "status": {"conditions": conditions},
    }


def config_map(**fields: Any) -> Raw:
    return {"metadata": metadata("lab-run", {}, **fields), "data": {}}


def condition(kind: str, status: str = "True", reason: str = "", message: str = "") -> Raw:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": LATER}
