"""What a user may say of the pods and their life in a cluster: the part of the spec that a laptop has no use for."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints
from typing_extensions import TypedDict  # pydantic takes Python's own from 3.12 on

from sft_api.base import ApiModel

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
"""Of a name in Kubernetes."""
OBJECT_NAME_PATTERN = rf"^{LABEL}([.]{LABEL})*$"
ENV_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
DATA_KEY_PATTERN = r"^[-._A-Za-z0-9]+$"
IMAGE_PATTERN = r"^\S+$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?([eE][0-9]+|[numkMGTPE]|[KMGTPE]i)?$"
MEMORY_PATTERN = r"^[1-9][0-9]*(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
QUALIFIED_NAME_PATTERN = rf"^({LABEL}([.]{LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"


def as_text(value: object) -> object:
    """8 as "8": both are quantities."""
    return str(value) if type(value) is int else value


ObjectName = Annotated[str, StringConstraints(max_length=253, pattern=OBJECT_NAME_PATTERN)]
QueueName = Annotated[str, StringConstraints(max_length=63, pattern=OBJECT_NAME_PATTERN)]
Quantity = Annotated[
    str,
    StringConstraints(max_length=32, pattern=QUANTITY_PATTERN),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True, "minimum": 0}),
    BeforeValidator(as_text),
]
Memory = Annotated[
    str,
    StringConstraints(max_length=32, pattern=MEMORY_PATTERN),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True, "minimum": 1}),
    BeforeValidator(as_text),
]
LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=LABEL_VALUE_PATTERN)]
Labels = Annotated[dict[str, LabelValue], Field(max_length=32)]
TaintKey = Annotated[str, StringConstraints(max_length=317, pattern=QUALIFIED_NAME_PATTERN)]
DataKey = Annotated[str, StringConstraints(max_length=253, pattern=DATA_KEY_PATTERN)]
Image = Annotated[str, StringConstraints(max_length=512, pattern=IMAGE_PATTERN)]
Amounts = Annotated[dict[str, Quantity], Field(max_length=32)]


class GangScheduler(StrEnum):
    AUTO = "Auto"
    NATIVE = "Native"
    VOLCANO = "Volcano"
    COSCHEDULING = "Coscheduling"
    KUEUE = "Kueue"
    KAI = "KAI"
    NONE = "None"


class KeyRef(ApiModel):
    """One key of a Secret or ConfigMap in the job's namespace."""

    name: ObjectName
    """Name of the object."""
    key: DataKey
    """The key in it."""


class EnvSource(ApiModel):
    """Where a variable's value comes from. Exactly one of secretKeyRef and configMapKeyRef."""

    secret_key_ref: KeyRef | None = None
    """A key of a Secret."""
    config_map_key_ref: KeyRef | None = None
    """A key of a ConfigMap."""


class EnvVar(ApiModel):
    """An environment variable. Exactly one of value and valueFrom."""

    name: Annotated[str, StringConstraints(max_length=253, pattern=ENV_NAME_PATTERN)]
    """Its name. Those by which the pods of a gang find each other (RANK, WORLD_SIZE, MASTER_ADDR, PET_…) and SFT_… are
    ours."""
    value: Annotated[str, StringConstraints(max_length=32768)] | None = None
    """Its value."""
    value_from: EnvSource | None = None
    """Where its value comes from."""


class Toleration(ApiModel):
    """As a pod's: a taint of nodes that the pods put up with."""

    key: TaintKey | None = None
    """The taint's key; unset with operator Exists: every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the value counts."""
    value: LabelValue | None = None
    """The taint's value, with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; unset: every effect."""
    toleration_seconds: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """How long a pod stays on a node with the taint, with effect NoExecute; unset: for ever."""


class Resources(ApiModel):
    """As a container's. The GPUs come from gpusPerNode."""

    requests: Amounts = {}
    """What a pod is sure to get: {cpu: 8, memory: 64Gi}."""
    limits: Amounts = {}
    """What a pod may not exceed."""


class SecretRef(ApiModel):
    """A Secret in the job's namespace."""

    name: ObjectName
    """Its name. Each of its keys becomes an environment variable: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on."""


class Credentials(ApiModel):
    """How the pods are let into the object stores. Exactly one of secretRef and serviceAccountName."""

    secret_ref: SecretRef | None = None
    """A Secret whose keys become environment variables."""
    service_account_name: ObjectName | None = None
    """The pods' ServiceAccount, where the cloud gives it an identity. Its API token is not mounted."""


class Scheduling(ApiModel):
    """How the pods of the gang get onto nodes."""

    gang: GangScheduler = GangScheduler.AUTO
    """Who places all pods of the gang or none. Native: Kubernetes itself (1.37, feature gate GenericWorkload) with the
    chart's admission policy. Volcano, Coscheduling, Kueue, KAI: that scheduler, which must be installed. None: pod by
    pod. Auto: Native where the cluster has it, else None; status.conditions says which, and why."""
    queue: QueueName | None = None
    """The queue that the gang waits in, with Volcano, Kueue (a LocalQueue, required) or KAI. An error with the others,
    which have none."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the trainer's pods, and of the gang where its scheduler ranks gangs."""
    scheduler_name: ObjectName | None = None
    """The scheduler of the trainer's pods. Unset: the one that `gang` asks for."""
    timeout_seconds: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """How long the pods of an attempt may take to be all running, from their creation; after that the job fails.
    Unset: as long as it takes. Time in a Kueue queue does not count."""


class Lifecycle(ApiModel):
    """What is done about failures, time and leftovers. May change while the job runs."""

    max_restarts: Annotated[int, Field(ge=0, le=10_000)] = 3
    """Restarts of the whole gang after failures. A newer checkpoint than at the restart before begins the count
    anew."""
    max_disruptions: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    """Restarts after evictions, preemptions and lost nodes, in all."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Seconds from the job's creation, time suspended not counted, after which it fails. Unset: none."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    """Seconds from the job's end to the removal of its pods and other children. The SFTJob itself stays. Unset: they
    stay with it."""
    hang_timeout_seconds: Annotated[int, Field(ge=10, le=1_000_000)] = 1800
    """How long no step may end before the gang is taken to hang: it says where, and is restarted. Longer than the
    longest step, validation or export."""
    loss_guard: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """A loss above it, of a step or of the held-out data, ends the run as diverged and nothing of it is kept. Unset:
    only a loss or gradient that is not finite does."""


OPAQUE = {"additionalProperties": {"x-kubernetes-preserve-unknown-fields": True}}
"""A mapping that Kubernetes knows, and our schema does not. Not the same on the mapping itself: CEL would then take two
of them for equal that have as many keys and none in common, and such a change would pass as none."""


class PodMetadata(TypedDict, total=False):
    """Labels and annotations of the pods."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # type: ignore[misc]

    labels: Labels
    """Labels besides ours."""
    annotations: Annotated[
        dict[str, Annotated[str, StringConstraints(max_length=16384)]],
        Field(max_length=32),
    ]
    """Annotations, for what else acts on pods."""


class PodTemplate(TypedDict, total=False):
    """A pod template, or a part of one, as a Pod has it."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # type: ignore[misc]

    metadata: PodMetadata
    """Labels and annotations of the pods."""
    spec: Annotated[dict[str, Any], Field(max_length=64, json_schema_extra=OPAQUE)]
    """Any field of a pod's spec; Kubernetes checks it when the pods are made."""
