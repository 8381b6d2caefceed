"""What a run says while it goes on: a JSON object a line, from the trainer to `sft run` and into the metrics files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from sft_api.base import ApiModel


class StepMetrics(ApiModel):
    """One optimizer step, as it stands in `metrics/attempt-<n>.jsonl`. Sums and means are over all ranks."""

    event: Literal["step"] = "step"
    step: int
    """Optimizer steps done, through all phases; the first is 1."""
    phase: str
    epoch: int
    """Pass over the phase's data; the first is 1."""
    loss: float
    """Mean cross-entropy over the step's loss tokens, in nats."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    learning_rate: float
    samples: int
    """Samples since the job began."""
    tokens: int
    """Tokens since the job began, padding not counted."""
    loss_tokens: int
    """Loss-bearing tokens since the job began."""
    samples_digest: str
    """Digest of the set of samples in this step: equal on any number of ranks."""
    seconds: float
    """Wall time of the step."""
    tokens_per_second: float
    """The step's tokens over its wall time, padding not counted."""
    mfu: float | None
    """Model FLOPs utilisation, of the device's dense bf16 peak; none where the peak is not known (CPU)."""
    packing_efficiency: float
    """Cost utilisation of the step's plan: mean cost of the ranks over the cost they wait for."""
    packing_bound: float
    """The best that any plan could reach for these samples on these ranks."""
    micro_batches: int
    """Largest number of micro-batches on a rank."""
    data_wait_seconds: float
    """How long the step waited for its batches."""
    checkpoint_stall_seconds: float
    """How long training stood still for a save between the step before and this one."""
    memory_bytes: int
    """Largest peak memory of a rank: of the device, on the CPU of the process."""
    time: float
    """Unix time at the end of the step."""


class ValidationMetrics(ApiModel):
    """The held-out data, scored."""

    event: Literal["validation"] = "validation"
    step: int
    phase: str
    loss: float
    """Mean cross-entropy over the held-out loss tokens."""
    accuracy: float
    """Share of the held-out loss tokens that the model ranks first, given what comes before them."""
    samples: int
    loss_tokens: int
    seconds: float
    time: float


class PreviewMessage(ApiModel):
    """A stretch of a prepared sample, decoded."""

    text: str
    trained: bool


class PreparedMetrics(ApiModel):
    """A phase's data (or the validation data, as phase `validation`), tokenised."""

    event: Literal["prepared"] = "prepared"
    phase: str
    fingerprint: str
    reused: bool
    samples: int
    tokens: int
    loss_tokens: int
    dropped: dict[str, int]
    """Samples left out, by reason."""
    truncated: int
    seconds: float
    preview: list[list[PreviewMessage]]
    """Three samples as trained."""


class PrepareProgress(ApiModel):
    """How far the preparation of a phase's data is."""

    event: Literal["prepareProgress"] = "prepareProgress"
    phase: str
    samples: int
    """Samples read so far."""
    fraction: float | None
    """Share of the input bytes read so far, where it is known."""


class PhasePlan(ApiModel):
    name: str
    samples: int
    epochs: int
    steps: int


class Started(ApiModel):
    """The first step is about to be taken."""

    event: Literal["started"] = "started"
    attempt: int
    total_steps: int
    phases: list[PhasePlan]
    resumed_from_step: int | None
    world_size: int
    zero_stage: int
    precision: str
    attention: str
    attention_reason: str
    packing: str
    parameters: int
    device: str


class CheckpointCommitted(ApiModel):
    event: Literal["checkpoint"] = "checkpoint"
    step: int
    phase: str
    uri: str
    bytes: int
    seconds: float
    """From the start of the save to COMPLETE."""
    stall_seconds: float
    """How long training stood still for it."""
    time: float


class Exported(ApiModel):
    event: Literal["export"] = "export"
    phase: str
    step: int
    uri: str
    seconds: float


class Message(ApiModel):
    """Something a person should read."""

    event: Literal["message"] = "message"
    level: Literal["info", "warning", "error"]
    text: str


class Finished(ApiModel):
    """The last line of a run."""

    event: Literal["finished"] = "finished"
    exit_code: int
    reason: str
    """The name of the exit code, as in `ExitCode`: Completed, Data, …"""
    message: str
    rank: int | None = None
    step: int | None = None
    checkpoint_step: int | None = None
    """Step of the newest committed checkpoint."""


Event = Annotated[
    StepMetrics
    | ValidationMetrics
    | PreparedMetrics
    | PrepareProgress
    | Started
    | CheckpointCommitted
    | Exported
    | Message
    | Finished,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
