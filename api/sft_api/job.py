"""The SFTJob as a whole: metadata as Kubernetes has it, spec, status."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from sft_api.base import ApiModel
from sft_api.spec import SFTJobSpec
from sft_api.status import SFTJobStatus

GROUP = "sftjob.dev"
VERSION = "v1alpha1"
KIND = "SFTJob"
API_VERSION: Literal["sftjob.dev/v1alpha1"] = "sftjob.dev/v1alpha1"

JOB_NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
JobName = Annotated[str, StringConstraints(max_length=40, pattern=JOB_NAME_PATTERN)]


class Metadata(ApiModel):
    """Kubernetes' ObjectMeta. Only the name means anything on a laptop; what else an API server writes is let through."""

    name: JobName
    """Name of the job, unique in its namespace: a lower-case letter, then letters, digits and hyphens, at most 40.
    The names of pods and services are made from it."""
    namespace: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = None
    """Namespace of the job in a cluster."""
    labels: dict[str, str] = {}
    """Labels, for selecting jobs."""
    annotations: dict[str, str] = {}
    """Annotations, for tools."""
    uid: str | None = None
    """Written by the API server."""
    resource_version: str | None = None
    """Written by the API server."""
    generation: int | None = None
    """Written by the API server: counts changes of the spec."""
    creation_timestamp: datetime | None = None
    """Written by the API server."""
    deletion_timestamp: datetime | None = None
    """Written by the API server."""
    deletion_grace_period_seconds: int | None = None
    """Written by the API server."""
    generate_name: str | None = None
    """Used by the API server to make up the name."""
    finalizers: list[str] = []
    """Kept by controllers."""
    owner_references: list[dict[str, Any]] = []
    """Objects whose deletion deletes this one."""
    managed_fields: list[dict[str, Any]] = []
    """Written by the API server."""
    self_link: str | None = None
    """Written by old API servers."""


class SFTJob(ApiModel):
    """Supervised fine-tuning of a small language model: a base model and data in, checkpoints and a model out."""

    api_version: Literal["sftjob.dev/v1alpha1"]
    """Always sftjob.dev/v1alpha1."""
    kind: Literal["SFTJob"]
    """Always SFTJob."""
    metadata: Metadata
    """Name, labels and annotations, as on any Kubernetes object."""
    spec: SFTJobSpec
    """What to train, on what, how, and where the result goes."""
    status: SFTJobStatus | None = None
    """What the operator has seen. Written by the operator alone."""
