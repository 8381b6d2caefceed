"""What a cluster cannot carry out though the manifest is valid, with its field: said before anything runs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from sft_api.job import SFTJob
from sft_api.manifest import Problem
from sft_operator.pods import CONTAINER
from sft_operator.settings import Settings


def cluster_problems(job: SFTJob, settings: Settings) -> list[Problem]:
    return [*image_problems(job, settings), *folder_problems(job)]


def image_problems(job: SFTJob, settings: Settings) -> Iterator[Problem]:
    if not job.spec.trainer.image and not settings.trainer_image:
        yield Problem(
            "spec.trainer.image", "is required: this operator was installed without a trainer.image of its own"
        )


def folder_problems(job: SFTJob) -> Iterator[Problem]:
    """What has to be shared by pods, and to outlive them, cannot be a folder of a pod's own."""
    prepared = job.spec.prepared_data
    places = {"spec.checkpoints.uri": job.spec.checkpoints.uri}
    if prepared is not None:
        places["spec.preparedData.uri"] = prepared.uri
    for path, uri in places.items():
        if uri.startswith("file://") and not is_mounted(job, uri.removeprefix("file://")):
            yield Problem(
                path,
                f"{uri} is a folder inside each pod, and is lost with it; allowed: s3://, gs://, az://,"
                " pvc://CLAIM/PATH, or a folder under a volume that spec.trainer.podTemplate mounts",
            )


def is_mounted(job: SFTJob, folder: str) -> bool:
    containers = job.spec.trainer.pod_template.get("spec", {}).get("containers", [])
    mounts = [
        mount for found in containers if found.get("name") == CONTAINER for mount in found.get("volumeMounts", [])
    ]
    return any(PurePosixPath(folder).is_relative_to(mount["mountPath"]) for mount in mounts if "mountPath" in mount)
