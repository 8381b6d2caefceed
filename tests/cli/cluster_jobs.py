"""SFTJobs and pods as an API server gives them: the smallest that stand for a state, and changes to them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

NOW = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)


def ago(**units: float) -> str:
    """A time before NOW, as it stands in an object."""
    return (NOW - timedelta(**units)).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(name: str = "granite", namespace: str = "lab", **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "sftjob.dev/v1alpha1",
        "kind": "SFTJob",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-of-{name}",
            "generation": 1,
            "creationTimestamp": ago(hours=3),
        },
        "spec": {"trainer": {"nodes": 2}, "lifecycle": {"maxRestarts": 3, "maxDisruptions": 100}},
        "status": {"observedGeneration": 1, **status},
    }


def running(name: str = "granite", namespace: str = "lab", **more: Any) -> dict[str, Any]:
    """One in its second phase and its second attempt."""
    status = {
        "state": "Running",
        "phase": {"name": "skills", "index": 1, "count": 2},
        "progress": progress(),
        "checkpoint": checkpoint(),
        "attempts": [failed_attempt(1), attempt(2, resumedFromStep=1000)],
        "restarts": 1,
        "disruptions": 0,
        "heldSeconds": 9000.0,
        "gpuSeconds": 144_000.0,
        "goodput": 0.93,
    }
    return job(name, namespace, **status | more)


def progress(**changes: Any) -> dict[str, Any]:
    given = {
        "step": 1234,
        "totalSteps": 5000,
        "epoch": 1,
        "samples": 157_952,
        "tokens": 80_000_000,
        "percent": 24,
        "etaSeconds": 7445,
        "loss": 0.43214,
        "gradNorm": 0.91,
        "learningRate": 2e-5,
        "tokensPerSecond": 12_345.6,
        "mfu": 0.41,
        "packingEfficiency": 0.987,
        "heartbeat": ago(seconds=4),
    }
    return given | changes


def checkpoint(**changes: Any) -> dict[str, Any]:
    given = {"uri": "s3://lab/runs/granite/ckpt/1200", "step": 1200, "phase": "skills", "time": ago(minutes=4)}
    return {**given, "verified": True, **changes}


def attempt(number: int, name: str = "granite", **changes: Any) -> dict[str, Any]:
    return {"name": f"{name}-{number}", "started": ago(hours=1), "running": ago(minutes=59), **changes}


def failed_attempt(number: int, **changes: Any) -> dict[str, Any]:
    ending = {
        "started": ago(hours=2),
        "ended": ago(hours=1),
        "reason": "OOMKilled",
        "message": "pod granite-1-worker-0 was killed: out of memory",
        "disruption": False,
        "checkpointStep": 1000,
        "log": "step 1033\nstep 1034\nKilled",
    }
    return attempt(number, **ending | changes)


def condition(kind: str, status: str, reason: str, message: str = "as it is", **ago_units: float) -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "observedGeneration": 1,
        "lastTransitionTime": ago(**ago_units or {"minutes": 5}),
        "reason": reason,
        "message": message,
    }


def pod(job: str, attempt: int, rank: int, namespace: str = "lab", **changes: Any) -> dict[str, Any]:
    """A pod of the gang as the training operator makes it."""
    kind, index = ("worker", rank - 1) if rank else ("master", 0)
    labels = {
        "sftjob.dev/job": job,
        "sftjob.dev/role": "train",
        "sftjob.dev/attempt": str(attempt),
        "training.kubeflow.org/replica-type": kind,
        "training.kubeflow.org/replica-index": str(index),
    }
    return bare_pod(f"{job}-{attempt}-{kind}-{index}", namespace, labels, **changes)


def prepare_pod(job: str, suffix: str = "abcde", namespace: str = "lab", **changes: Any) -> dict[str, Any]:
    labels = {"sftjob.dev/job": job, "sftjob.dev/role": "prepare", "sftjob.dev/attempt": "0"}
    return bare_pod(f"{job}-prepare-{suffix}", namespace, labels, **changes)


def bare_pod(
    name: str, namespace: str, labels: dict[str, str], phase: str = "Running", created: str = ago(hours=1)
) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": labels, "creationTimestamp": created}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": phase}}
