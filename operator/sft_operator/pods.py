"""The pods of a job: what every one of them has, what the trainer's have besides, and the user's overrides.

Pure. They pass the restricted Pod Security Standard, have a read-only root and no API token.
"""

from __future__ import annotations

from typing import Any

from sft_api import labels
from sft_api.job import SFTJob
from sft_api.spec import Trainer
from sft_operator.gang import GangChoice, scheduler_name
from sft_operator.merge import merged, merged_list
from sft_operator.settings import Settings

CONTAINER = "pytorch"
"""The training operator asks for this name. The prepare pod has it too, so that spec.trainer.podTemplate fits both."""
CLAIM_FOLDER = "/mnt/claims"
GRACE_SECONDS = 300
"""What a pod has after SIGTERM, for a checkpoint."""
GRACE_TO_SAVE_SECONDS = 270
"""What its launcher gives the ranks of that."""
USER = 10001
"""The images' user. Said here too, for the training operator's init container has an image that would run as root."""


def prepare_template(job: SFTJob, settings: Settings, role: dict[str, str], claims: tuple[str, ...]) -> dict[str, Any]:
    """The pod that prepares the data: on any node, without a GPU."""
    args = ["prepare", f"{labels.CONFIG_FOLDER}/run.json"]
    spec = pod_spec(job, settings, claims, args)
    return overridden(job, {"metadata": {"labels": job_labels(job) | role}, "spec": spec}, {"restartPolicy": "Never"})


def trainer_template(
    job: SFTJob, settings: Settings, role: dict[str, str], claims: tuple[str, ...], choice: GangChoice
) -> dict[str, Any]:
    """A pod of the gang. Its restart policy is the PyTorchJob's to say."""
    trainer, scheduling = job.spec.trainer, job.spec.scheduling
    args = ["train", f"{labels.CONFIG_FOLDER}/run.json", "--processes", str(processes(job))]
    placed = {
        "schedulerName": scheduler_name(scheduling, choice),
        "priorityClassName": scheduling.priority_class_name,
        "nodeSelector": dict(trainer.node_selector),
        "tolerations": [toleration.model_dump(by_alias=True, exclude_none=True) for toleration in trainer.tolerations],
    }
    spec = merged(pod_spec(job, settings, claims, args), {key: value for key, value in placed.items() if value})
    spec["containers"][0]["ports"] = [
        {"name": "pytorchjob-port", "containerPort": 23456},
        {"name": "metrics", "containerPort": labels.METRICS_PORT},
    ]
    if amounts := resources(trainer, settings.gpu_resource):
        spec["containers"][0]["resources"] = amounts
    return overridden(job, {"metadata": {"labels": job_labels(job) | role}, "spec": spec}, {})


def processes(job: SFTJob) -> int:
    """Ranks in each pod: one for each GPU, one on the CPU."""
    return max(1, job.spec.trainer.gpus_per_node)


def job_labels(job: SFTJob) -> dict[str, str]:
    """On every object of a job. The uid tells it from those of an earlier job of the same name."""
    uid = job.metadata.uid or ""
    return {labels.JOB: job.metadata.name, labels.OWNER_UID: uid, labels.MANAGED_BY: labels.MANAGER}


def overridden(job: SFTJob, template: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The template with the user's overrides, and after them what we rely on."""
    [container] = template["spec"]["containers"]
    ours = {"metadata": template["metadata"], "spec": {**fixed, "containers": [{"name": CONTAINER}]}}
    result = merged(merged(template, job.spec.trainer.pod_template), ours)
    for found in result["spec"]["containers"]:
        if found["name"] == CONTAINER:
            found["args"] = container["args"]
            found.pop("command", None)
    return result


def pod_spec(job: SFTJob, settings: Settings, claims: tuple[str, ...], args: list[str]) -> dict[str, Any]:
    credentials = job.spec.checkpoints.credentials
    account = credentials.service_account_name if credentials else None
    return {
        **({"serviceAccountName": account} if account else {}),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # Else the launcher is its container's first process, which has no default for SIGTERM: deleted while Python
        # starts, a pod would stay for its whole grace period.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
            # A claim's files become this user's.
            **({"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"} if claims else {}),
        },
        "containers": [container(job, settings, claims, args)],
        "volumes": [
            {"name": "run", "configMap": {"name": labels.config_map(job.metadata.name)}},
            {"name": "work", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": shared_memory(job.spec.trainer)},
            *({"name": f"claim-{claim}", "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
        ],
    }


def container(job: SFTJob, settings: Settings, claims: tuple[str, ...], args: list[str]) -> dict[str, Any]:
    credentials = job.spec.checkpoints.credentials
    secret = credentials.secret_ref.name if credentials and credentials.secret_ref else None
    return {
        "name": CONTAINER,
        "image": job.spec.trainer.image or settings.trainer_image,
        "args": args,
        "env": environment(job),
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # Where the launcher could not write its own, the last lines of the log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "run", "mountPath": labels.CONFIG_FOLDER, "readOnly": True},
            {"name": "work", "mountPath": "/tmp"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *({"name": f"claim-{claim}", "mountPath": f"{CLAIM_FOLDER}/{claim}"} for claim in claims),
        ],
    }


def environment(job: SFTJob) -> list[dict[str, Any]]:
    """Ours, then the user's."""
    ours = {
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "SFTJOB_CACHE": "/tmp/sftjob",
        "SFT_GRACE_SECONDS": str(GRACE_TO_SAVE_SECONDS),
        "SFT_METRICS_ADDRESS": "0.0.0.0",
        "SFT_METRICS_PORT": str(labels.METRICS_PORT),
    }
    given = [variable.model_dump(by_alias=True, exclude_none=True) for variable in job.spec.trainer.env]
    return merged_list([{"name": name, "value": value} for name, value in ours.items()], given, by="name")


def shared_memory(trainer: Trainer) -> dict[str, str]:
    return {"medium": "Memory", **({"sizeLimit": trainer.shared_memory} if trainer.shared_memory else {})}


def resources(trainer: Trainer, gpu_resource: str) -> dict[str, dict[str, str]]:
    """Requests and limits as given; GPUs, which Kubernetes wants as limits, from gpusPerNode."""
    limits = dict(trainer.resources.limits)
    if trainer.gpus_per_node:
        limits[gpu_resource] = str(trainer.gpus_per_node)
    amounts = {"requests": dict(trainer.resources.requests), "limits": limits}
    return {kind: values for kind, values in amounts.items() if values}
