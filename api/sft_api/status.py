"""The status of an SFTJob: what the operator has seen, and what `kubectl get sft` shows of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from sft_api.base import ApiModel

Line = Annotated[str, StringConstraints(max_length=1024)]
Text = Annotated[str, StringConstraints(max_length=4096)]
Word = Annotated[str, StringConstraints(max_length=128)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class State(StrEnum):
    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    PREPARED = "Prepared"
    GANG_SCHEDULED = "GangScheduled"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    CHECKPOINT_HEALTHY = "CheckpointHealthy"
    SUCCEEDED = "Succeeded"
    STALLED = "Stalled"
    RECONCILING = "Reconciling"


class Condition(ApiModel):
    """One aspect of the job's state, as any Kubernetes condition."""

    type: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    """What the condition is about: Prepared, GangScheduled, Running, Suspended, CheckpointHealthy, Succeeded, Stalled
    or Reconciling."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Count | None = None
    """The metadata.generation that this was judged by."""
    last_transition_time: datetime
    """When the status last changed."""
    reason: Annotated[
        str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
    ]
    """Why, in one CamelCase word."""
    message: Text
    """Why, in a sentence for a person."""


class PhaseStatus(ApiModel):
    """The phase being trained."""

    name: Word
    """Its name."""
    index: Count
    """Its place among the phases; the first is 0."""
    count: Count
    """Number of phases."""


class Progress(ApiModel):
    """How far training is, and how it goes: what `/progress` of the trainer answers."""

    step: Count
    """Optimizer steps done, through all phases."""
    total_steps: Count
    """Optimizer steps of the whole job."""
    epoch: Count
    """Pass over the phase's data; the first is 1."""
    samples: Count
    """Samples trained on since the job began."""
    tokens: Count
    """Tokens trained on since the job began, padding not counted."""
    percent: Annotated[int, Field(ge=0, le=100)]
    """Steps done of all steps, in percent, rounded down."""
    eta_seconds: Count | None = None
    """Seconds to the end at the present speed."""
    loss: float | None = None
    """Mean cross-entropy over the last step's loss tokens, in nats."""
    grad_norm: float | None = None
    """Global norm of the last step's gradient, before clipping."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    tokens_per_second: float | None = None
    """Tokens per second of all ranks, padding not counted."""
    mfu: float | None = None
    """Model FLOPs utilisation, of the devices' dense bf16 peak."""
    packing_efficiency: float | None = None
    """Mean cost of the ranks over the cost they wait for."""
    heartbeat: datetime
    """When the last step ended."""


class PhasePlanStatus(ApiModel):
    """What preparation found for one phase."""

    name: Word
    """The phase."""
    samples: Count
    """Samples to train on."""
    tokens: Count
    """Their tokens."""
    steps: Count
    """Optimizer steps, over all epochs."""
    dropped: Count
    """Samples left out, for any reason."""
    truncated: Count
    """Samples cut at maxSequenceLength."""
    fingerprint: Word
    """Fingerprint of the prepared data."""


class PlanStatus(ApiModel):
    """What is to be trained, known once the data are prepared."""

    samples: Count
    """Samples of all phases."""
    tokens: Count
    """Tokens of all phases."""
    phases: Annotated[list[PhasePlanStatus], Field(max_length=32)]
    """Each phase."""


class CheckpointStatus(ApiModel):
    """The newest committed checkpoint."""

    uri: Line
    """Where it is."""
    step: Count
    """Optimizer steps done when it was taken."""
    phase: Word
    """Phase it was taken in."""
    time: datetime
    """When it was committed."""
    verified: bool
    """Whether its checksums were seen to hold."""


class ExportStatus(ApiModel):
    """The newest exported model."""

    uri: Line
    """Where it is."""


class Attempt(ApiModel):
    """One start of the gang."""

    name: Word
    """Name of the attempt's objects."""
    started: datetime
    """When it was created."""
    running: datetime | None = None
    """When all of its pods ran."""
    ended: datetime | None = None
    """When it ended."""
    reason: Word | None = None
    """Why it ended, in one CamelCase word."""
    message: Text | None = None
    """Why it ended, in a sentence for a person."""
    resumed_from_step: Count | None = None
    """Step of the checkpoint it went on from; none where it began anew."""
    checkpoint_step: Count | None = None
    """Step of the newest checkpoint known when it ended."""
    held_seconds: Seconds | None = None
    """How long its pods held their nodes, from when the first was placed."""
    disruption: bool | None = None
    """Whether it ended by an eviction, a preemption or a lost node, rather than by a failure."""
    log: Annotated[str, StringConstraints(max_length=8192)] | None = None
    """Last lines of the log of the pod that failed."""


class SFTJobStatus(ApiModel):
    """What the operator has seen."""

    observed_generation: Count | None = None
    """The metadata.generation that this status answers to."""
    state: State | None = None
    """Where the job stands, in one word."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = []
    """The state in its aspects."""
    phase: PhaseStatus | None = None
    """The phase being trained."""
    progress: Progress | None = None
    """How far training is, and how it goes."""
    plan: PlanStatus | None = None
    """What is to be trained."""
    checkpoint: CheckpointStatus | None = None
    """The newest committed checkpoint."""
    export: ExportStatus | None = None
    """The newest exported model."""
    attempts: Annotated[list[Attempt], Field(max_length=10)] = []
    """The last ten starts of the gang, oldest first."""
    restarts: Count | None = None
    """Restarts after failures since the last newer checkpoint."""
    disruptions: Count | None = None
    """Restarts after evictions, preemptions and lost nodes."""
    held_seconds: Seconds | None = None
    """How long the gang held its nodes, over all attempts."""
    gpu_seconds: Seconds | None = None
    """GPU time held, in seconds, over all attempts."""
    goodput: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the time held that went into steps which still count."""
    suspended_seconds: Seconds | None = None
    """How long the job was suspended, up to the last resumption."""
    finished: datetime | None = None
    """When the job succeeded or failed."""
