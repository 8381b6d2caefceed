"""The manifests of a job's children, complete and literal. The only mention of PyTorchJob. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from sft_api import labels
from sft_api.job import API_VERSION, KIND, SFTJob
from sft_api.pods import GangScheduler
from sft_api.recipes import resolve
from sft_api.run import PERMANENT, RunConfig
from sft_operator.gang import GangChoice
from sft_operator.observed import Manifest, Role
from sft_operator.pods import CLAIM_FOLDER, CONTAINER, job_labels, prepare_template, processes, trainer_template
from sft_operator.settings import Settings

PREPARE_RETRIES = 6
_CLAIM = re.compile(r"^pvc://(?P<name>[^/]+)(?:/(?P<folder>.*))?$")


def attempt(job: SFTJob, number: int, choice: GangChoice, settings: Settings) -> tuple[Manifest, ...]:
    """What makes an attempt: its PodGroup, where Kubernetes itself places the gang, and its PyTorchJob."""
    group = (pod_group(job, number),) if choice.scheduler is GangScheduler.NATIVE else ()
    return (*group, pytorch_job(job, number, choice, settings))


def config_map(job: SFTJob) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, labels.config_map(job.metadata.name)),
        "data": {"run.json": run_config(job).model_dump_json(by_alias=True, indent=2)},
    }


def prepare_job(job: SFTJob, settings: Settings) -> Manifest:
    """Kubernetes' own retries do for it: what is permanent ends it, what takes the pod away does not count."""
    role = {labels.ROLE: Role.PREPARE.value, labels.ATTEMPT: "0"}
    permanent = {
        "action": "FailJob",
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [int(code) for code in PERMANENT]},
    }
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(job, labels.prepare(job.metadata.name), role),
        "spec": {
            "backoffLimit": PREPARE_RETRIES,
            "podFailurePolicy": {"rules": [permanent, disrupted]},
            "template": prepare_template(job, settings, role, claims(job)),
        },
    }


def pod_group(job: SFTJob, number: int) -> Manifest:
    role = {labels.ATTEMPT: str(number)}
    return {
        "apiVersion": "scheduling.k8s.io/v1beta1",
        "kind": "PodGroup",
        "metadata": metadata(job, labels.attempt(job.metadata.name, number), role),
        "spec": {"schedulingPolicy": {"gang": {"minCount": job.spec.trainer.nodes}}},
    }


def pytorch_job(job: SFTJob, number: int, choice: GangChoice, settings: Settings) -> Manifest:
    """A master and its workers. It restarts none of its pods: a gang is restarted whole, and by us."""
    workers = job.spec.trainer.nodes - 1
    name = labels.attempt(job.metadata.name, number)
    role = {labels.ROLE: Role.TRAIN.value, labels.ATTEMPT: str(number)}
    member = {labels.POD_GROUP: name} if choice.scheduler is GangScheduler.NATIVE else {}
    queue = queue_label(job, choice)
    in_queue = {} if choice.scheduler is GangScheduler.KUEUE else queue  # Kueue's stands on the PyTorchJob alone
    template = trainer_template(job, settings, role | member | in_queue, claims(job), choice)
    replica = {"restartPolicy": "Never", "template": template}
    given = metadata(job, name, role | queue)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": unowned(given) if choice.scheduler is GangScheduler.KAI else given,
        "spec": {
            "nprocPerNode": str(processes(job)),
            "runPolicy": {"cleanPodPolicy": "Running", **run_policy(job, choice)},
            "pytorchReplicaSpecs": {
                "Master": {"replicas": 1, **replica},
                **({"Worker": {"replicas": workers, **replica}} if workers else {}),
            },
        },
    }


def run_policy(job: SFTJob, choice: GangChoice) -> dict[str, Any]:
    """What the training operator passes on to a scheduler that is not Kubernetes' own."""
    scheduling = job.spec.scheduling
    if choice.scheduler is GangScheduler.KUEUE:
        return {"suspend": True}  # Kueue lets it go
    if choice.scheduler not in (GangScheduler.VOLCANO, GangScheduler.COSCHEDULING):
        return {}
    policy = {
        "minAvailable": job.spec.trainer.nodes,
        "queue": scheduling.queue,
        "priorityClass": scheduling.priority_class_name,
        "scheduleTimeoutSeconds": scheduling.timeout_seconds,
    }
    return {"schedulingPolicy": {key: value for key, value in policy.items() if value is not None}}


def queue_label(job: SFTJob, choice: GangChoice) -> dict[str, str]:
    queue = job.spec.scheduling.queue
    label = {
        GangScheduler.KUEUE: "kueue.x-k8s.io/queue-name",
        GangScheduler.KAI: "kai.scheduler/queue",
    }.get(choice.scheduler)
    return {label: queue} if label and queue else {}


def metadata(job: SFTJob, name: str, role: dict[str, str] | None = None) -> dict[str, Any]:
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid or "",
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "name": name,
        "namespace": job.metadata.namespace or "default",
        "labels": job_labels(job) | (role or {}),
        "ownerReferences": [owner],
    }


def unowned(given: dict[str, Any]) -> dict[str, Any]:
    """For KAI, which takes the topmost owner for the workload and knows no SFTJob. The label says whose it is."""
    return {key: value for key, value in given.items() if key != "ownerReferences"}


# ── what pods are told ─────────────────────────────────────────────────────────────────────────────────────────────


def run_config(job: SFTJob) -> RunConfig:
    """The resolved job as its pods see it: claims are folders there."""
    return RunConfig.model_validate(mapped(resolve(job).model_dump(mode="json"), as_folder))


def claims(job: SFTJob) -> tuple[str, ...]:
    """The PersistentVolumeClaims that the job's URIs name, sorted."""
    found = {claim["name"] for text in texts(resolve(job).model_dump(mode="json")) if (claim := _CLAIM.match(text))}
    return tuple(sorted(found))


def as_folder(text: str) -> str:
    claim = _CLAIM.match(text)
    return f"file://{CLAIM_FOLDER}/{claim['name']}/{claim['folder'] or ''}".rstrip("/") if claim else text


def mapped(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, dict):
        return {key: mapped(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [mapped(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from texts(child)
