"""The SFTJob as a whole: metadata as Kubernetes has it, spec, status."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from sft_api.base import ApiModel
from sft_api.spec import SFTJobSpec
from sft_api.status import SFTJobStatus

GROUP = "sftjob.dev"
VERSION = "v1alpha1"
KIND = "SFTJob"
API_VERSION: Literal["sftjob.dev/v1alpha1"] = "sftjob.dev/v1alpha1"

JOB_NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
JobName = Annotated[str, StringConstraints(max_length=40, pattern=JOB_NAME_PATTERN)]

SERVER = Field(json_schema_extra={"readOnly": True})
"""Let through where an object was read from a cluster; not offered to people."""


class Metadata(ApiModel):
    """Kubernetes' ObjectMeta. On a laptop only the name means anything; what an API server writes is let through."""

    name: JobName
    """Name of the job, unique in its namespace: a lower-case letter, then letters, digits and hyphens, at most 40.
    The names of pods and services are made from it."""
    namespace: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = None
    """Namespace of the job in a cluster."""
    labels: dict[str, str] = {}
    """Labels, for selecting jobs."""
    annotations: dict[str, str] = {}
    """Annotations, for tools."""
    uid: Annotated[str | None, SERVER] = None
    """Written by the API server."""
    resource_version: Annotated[str | None, SERVER] = None
    """Written by the API server."""
    generation: Annotated[int | None, SERVER] = None
    """Written by the API server: counts changes of the spec."""
    creation_timestamp: Annotated[datetime | None, SERVER] = None
    """Written by the API server."""
    deletion_timestamp: Annotated[datetime | None, SERVER] = None
    """Written by the API server."""
    deletion_grace_period_seconds: Annotated[int | None, SERVER] = None
    """Written by the API server."""
    generate_name: Annotated[str | None, SERVER] = None
    """Used by the API server to make up a name."""
    finalizers: Annotated[list[str], SERVER] = []
    """Written by controllers."""
    owner_references: Annotated[list[dict[str, Any]], SERVER] = []
    """Written by controllers: objects whose deletion deletes this one."""
    managed_fields: Annotated[list[dict[str, Any]], SERVER] = []
    """Written by the API server."""
    self_link: Annotated[str | None, SERVER] = None
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
    status: Annotated[SFTJobStatus | None, SERVER] = None
    """What the operator has seen. Written by the operator alone."""
