"""How the objects of a job are named and labelled in a cluster: the only place that spells them.

<job>-run           ConfigMap: run.json
<job>-prepare       Job: the preparation
<job>-<attempt>     PyTorchJob, its pods and services, and the gang's PodGroup
"""

from __future__ import annotations

JOB = "sftjob.dev/job"
"""The SFTJob's name, on every object of it."""
ROLE = "sftjob.dev/role"
"""`prepare` or `train`, on pods and what makes them."""
ATTEMPT = "sftjob.dev/attempt"
"""Number of the attempt, on pods and what makes them."""
POD_GROUP = "sftjob.dev/pod-group"
"""On pods: the PodGroup that our admission policy puts them into."""
MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "sft-operator"
"""Value of MANAGED_BY, and the operator's name as a field manager."""
OWNER_UID = "sftjob.dev/owner-uid"
"""Annotation: the SFTJob's uid, where an owner reference cannot stand."""

CONFIG_FOLDER = "/etc/sftjob"
"""Where run.json is mounted in pods."""
METRICS_PORT = 8080
"""Port of the first rank's /progress, /metrics and /healthz."""


def config_map(job: str) -> str:
    return f"{job}-run"


def prepare(job: str) -> str:
    return f"{job}-prepare"


def attempt(job: str, number: int) -> str:
    return f"{job}-{number}"
