"""The spec of an SFTJob: everything a user may write.

Every optional field that is left out is filled in by `sft_api.recipes.resolve`; the trainer only ever sees the
resolved `sft_api.run.RunConfig`. Attribute docstrings become `kubectl explain` and the generated reference.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from sft_api.base import ApiModel
from sft_api.pods import (
    Credentials,
    EnvVar,
    Image,
    Labels,
    Lifecycle,
    Memory,
    PodTemplate,
    Resources,
    Scheduling,
    Toleration,
)

CLAIM = r"pvc://[a-z0-9]([-a-z0-9]{0,55}[a-z0-9])?"
"""A claim without dots, and short enough that a volume `claim-…` of a pod can be named after it."""
URI_PATTERN = rf"^(file://\S+|{CLAIM}/\S+|(s3|gs|az|hf)://[^/\s]+/\S+)$"
MODEL_URI_PATTERN = rf"^(file://\S+|{CLAIM}(/\S*)?|(s3|gs|az)://[^/\s]+/\S+|hf://[^/@\s]+/[^/@\s]+)$"
DATA_URI_PATTERN = (
    rf"^(file://|{CLAIM}/|(s3|gs|az)://[^/\s]+/|hf://(datasets/)?[^/\s]+/[^/\s]+/)"
    r"\S*(\.jsonl|\.jsonl\.gz|\.jsonl\.zst|\.parquet|[*?\]])$"
)
STORE_URI_PATTERN = rf"^(file://[^\s*?\[]*[^\s*?\[/]/*|{CLAIM}(/[^\s*?\[]*)?|(s3|gs|az)://[^/\s*?\[]+(/[^\s*?\[]*)?)$"
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

Uri = Annotated[str, StringConstraints(max_length=1024, pattern=URI_PATTERN)]
ModelUri = Annotated[str, StringConstraints(max_length=1024, pattern=MODEL_URI_PATTERN)]
DataUri = Annotated[str, StringConstraints(max_length=1024, pattern=DATA_URI_PATTERN)]
StoreUri = Annotated[str, StringConstraints(max_length=1024, pattern=STORE_URI_PATTERN)]
Name = Annotated[str, StringConstraints(max_length=40, pattern=NAME_PATTERN)]
Token = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Recipe(StrEnum):
    LAB = "LAB"
    TULU = "TULU"
    TULU_PLUS_PLUS = "TULUPlusPlus"
    NONE = "none"


class Strategy(StrEnum):
    STACKED = "Stacked"
    PHASED = "Phased"
    BY_LENGTH = "ByLength"


class DataFormat(StrEnum):
    MESSAGES = "Messages"
    PRETRAINING = "Pretraining"


class Overlong(StrEnum):
    TRUNCATE = "Truncate"
    DROP = "Drop"
    FAIL = "Fail"


class Packing(StrEnum):
    AUTO = "Auto"
    PACKED = "Packed"
    PADDED = "Padded"


class LearningRateSchedule(StrEnum):
    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"


class OptimizerState(StrEnum):
    KEEP = "Keep"
    RESET = "Reset"


class Attention(StrEnum):
    FLASH_ATTENTION_4 = "FlashAttention4"
    FLASH_ATTENTION_3 = "FlashAttention3"
    FLASH_ATTENTION_2 = "FlashAttention2"
    VARLEN = "Varlen"
    SDPA = "SDPA"


class Precision(StrEnum):
    BF16 = "BF16"
    FP32 = "FP32"


class Export(StrEnum):
    PHASE_END = "PhaseEnd"
    END = "End"
    NEVER = "Never"


class ChatTemplate(ApiModel):
    """A chat template for a base model. Exactly one of name, inline and uri."""

    name: Literal["ChatML", "Llama3", "Granite", "Mistral", "Zephyr"] | None = None
    """A built-in template; it brings its own special tokens and end of turn."""
    inline: Annotated[str, StringConstraints(min_length=1, max_length=32768)] | None = None
    """The Jinja source of the template."""
    uri: Uri | None = None
    """An object that holds the Jinja source of the template."""
    special_tokens: Annotated[list[Token], Field(max_length=64)] = []
    """Special tokens that an inline template or one at a URI needs; those the tokenizer lacks are added and the
    embeddings resized."""
    end_of_turn: Token | None = None
    """The token that ends the assistant's turn; it becomes the model's end of sequence. A template given inline or by
    URI needs it unless the tokenizer's own end of sequence ends its turns."""


class Model(ApiModel):
    """The model to fine-tune."""

    uri: ModelUri
    """A Hugging Face model folder: hf://owner/name, s3://, gs://, az://, file:// or pvc://claim/path."""
    revision: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// model (unset: main). An error with any other scheme."""
    trust_remote_code: bool = False
    """Whether code that the model's repository ships may be run."""
    chat_template: ChatTemplate | None = None
    """A chat template in place of the tokenizer's own. Base models have none and need one for Messages data."""


class DataSource(ApiModel):
    """Some of a phase's data."""

    uri: DataUri
    """One file, or a glob (`*`, `?`, `[…]`, `**`) of files: .jsonl, .jsonl.gz, .jsonl.zst or .parquet, at file://,
    s3://, gs://, az://, hf://datasets/owner/name/ or pvc://claim/."""
    format: DataFormat = DataFormat.MESSAGES
    """Messages: conversations in the field `messages`. Pretraining: documents in the field `text`."""


class BatchOverrides(ApiModel):
    """How samples become optimizer steps. What is left out comes from the recipe."""

    effective_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Samples in one optimizer step, exactly, whatever the number of GPUs. The last step of an epoch takes the
    remainder."""
    max_tokens_per_gpu: Annotated[int, Field(ge=1, le=4_194_304)] | None = None
    """Capacity of one micro-batch in tokens: a matter of memory, not of mathematics. At least maxSequenceLength.
    Unset: 16384, or maxSequenceLength where that is more."""
    max_sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest sample in tokens. Unset: 4096."""
    overlong: Overlong | None = None
    """What becomes of a longer sample: Truncate keeps its beginning (and splits a Pretraining document into samples),
    Drop leaves it out, Fail stops the job. Counted, never silent."""


class Batch(BatchOverrides):
    """The job's batch settings. What is left out comes from the recipe."""

    packing: Packing = Packing.AUTO
    """Packed: samples side by side without padding. Padded: the paper's padded variant, for models whose attention
    cannot keep packed samples apart. Auto: Packed where the self-test passes, else Padded."""


class Warmup(ApiModel):
    """A linear warm-up. Exactly one of steps and ratio. The first step already learns."""

    steps: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """Optimizer steps."""
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the phase's steps, rounded up."""


class OptimizerOverrides(ApiModel):
    """AdamW and its learning rate. What is left out comes from the recipe."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """The learning rate after the warm-up."""
    schedule: LearningRateSchedule | None = None
    """What the learning rate does after the warm-up, to the end of the phase: stay, or decay to zero."""
    warmup: Warmup | None = None
    """How the learning rate rises at the start of a phase. Exactly one of steps and ratio."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = None
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, Field(gt=0, le=1)] | None = None
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """The gradient is scaled down to this global norm where it exceeds it."""


class PhaseOptimizerOverrides(OptimizerOverrides):
    """A phase's own optimizer settings. What is left out is the job's."""

    state: OptimizerState = OptimizerState.KEEP
    """At the start of this phase: Keep Adam's moments and step count, or Reset them."""


class Phase(ApiModel):
    """One part of the data, and how to train on it."""

    name: Name
    """Unique within the job; it names the phase in metrics, checkpoints and exports."""
    data: Annotated[list[DataSource], Field(min_length=1, max_length=256)]
    """Where the phase's samples are."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over this phase's data. Phased only; unset: the job's."""
    batch: BatchOverrides | None = None
    """This phase's batch settings. Phased only; what is left out is the job's."""
    optimizer: PhaseOptimizerOverrides | None = None
    """This phase's optimizer settings. Phased only; what is left out is the job's."""


class Interval(ApiModel):
    """How often. Exactly one of steps and samples."""

    steps: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Optimizer steps."""
    samples: Annotated[int, Field(ge=1, le=1_000_000_000_000)] | None = None
    """Samples trained on; due at the first step that reaches or crosses a multiple."""


class CheckpointInterval(ApiModel):
    """How often. Exactly one of steps, samples and minutes."""

    steps: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Optimizer steps."""
    samples: Annotated[int, Field(ge=1, le=1_000_000_000_000)] | None = None
    """Samples trained on; due at the first step that reaches or crosses a multiple."""
    minutes: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """Minutes since the last checkpoint or the start."""


class Validation(ApiModel):
    """Data held out of training, scored as exactly as the training loss. Exactly one of fraction and uri."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training samples to hold out, chosen by their content: equal samples are all held out or none."""
    uri: DataUri | None = None
    """Samples of their own: one file or a glob, as a phase's data."""
    format: DataFormat | None = None
    """The format at uri (unset: Messages). An error with fraction."""
    every: Interval | None = None
    """How often to score, besides before the first step and at each phase's end: exactly one of steps and samples.
    Unset: only then."""


class Compute(ApiModel):
    """How many machines, and how they compute: what the trainer itself is told."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of nodes. `sft run` uses the one machine it is on and says so where this asks for more."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs on each node; 0 trains on the CPU."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] | None = None
    """DeepSpeed ZeRO stage. Unset: the lowest that fits in the memory."""
    attention: Attention | None = None
    """Attention backend. Unset: the fastest that passes the self-test."""
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    precision: Precision = Precision.BF16
    """Of weights and activations. Masters, moments, gradient accumulation and reduction are in fp32 always."""


class Trainer(Compute):
    """The machines and how they compute."""

    image: Image | None = None
    """The trainer's image. Unset: the one that the operator was installed with."""
    resources: Resources = Resources()
    """Of each trainer pod, besides its GPUs."""
    node_selector: Labels = {}
    """Labels of the nodes that the trainer's pods may run on."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that the trainer's pods put up with."""
    env: Annotated[
        list[EnvVar],
        Field(
            max_length=128, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
    ] = []
    """Environment variables of all pods of the job: NCCL settings, proxies, HF_TOKEN from a Secret."""
    shared_memory: Memory | None = None
    """Size of /dev/shm, which counts as memory of the pod. Unset: no limit but the pod's."""
    pod_template: PodTemplate = {}
    """Overrides for all pods of the job, merged into them last, lists by name: volumes, affinity, image pull secrets.
    The trainer's container is `pytorch`. What the operator relies on is refused: restart policy, host name, gang, and
    that container's command and image."""


class Keep(ApiModel):
    """Which complete checkpoints to keep. The newest is always kept."""

    last: Annotated[int, Field(ge=1, le=10_000)] = 2
    """The newest so many."""
    phase_ends: bool = True
    """Those at a phase's end."""
    best: Annotated[int, Field(ge=0, le=100)] = 0
    """The so many with the lowest validation loss; the held-out data is then scored at every checkpoint. Needs
    validation."""


class Saving(ApiModel):
    """Where and how often the trainer saves."""

    uri: StoreUri
    """Prefix in an object store, of this job alone; or pvc://claim/path: a folder on a PersistentVolumeClaim of the
    job's namespace, in a cluster only."""
    every: CheckpointInterval = CheckpointInterval(steps=100)
    """How often to commit a checkpoint, besides at each phase's end and on SIGTERM: exactly one of steps, samples and
    minutes."""
    keep: Keep = Keep()
    """Which complete checkpoints to keep. May change while the job runs."""
    upload_megabytes_per_second: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """How fast a machine uploads checkpoints while it trains, at most, in 1,000,000 bytes a second, shared equally by
    its ranks. What training has to wait for (the next save, the end, a stop) goes as fast as it can. Unset: no
    limit."""
    export: Export = Export.PHASE_END
    """When to write a Hugging Face model (safetensors, bf16) for inference."""


class Checkpoints(Saving):
    """Where the job's results are kept, and how often its state."""

    credentials: Credentials | None = None
    """How the pods are let into the object stores of checkpoints, data and model."""


class PreparedData(ApiModel):
    """Where tokenised data is kept."""

    uri: StoreUri
    """Prefix in an object store. Jobs that share it prepare equal data once. Unset: `data` under checkpoints.uri."""


class SFTJobSpec(ApiModel):
    """What to train, on what, how, and where the result goes."""

    model: Model
    """The model to fine-tune."""
    recipe: Recipe = Recipe.LAB
    """A preset from Table 1 of "Unveiling the Secret Recipe" (ICLR 2025); every other field overrides it."""
    strategy: Strategy = Strategy.STACKED
    """Stacked: the data of all phases as one. Phased: one phase after another. ByLength: all data, the shorter half,
    then the longer."""
    phases: Annotated[list[Phase], Field(min_length=1, max_length=32)]
    """The data, in phases."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over the data. Unset: the recipe's."""
    validation: Validation | None = None
    """Data held out of training, scored as exactly as the training loss. Exactly one of fraction and uri."""
    batch: Batch = Batch()
    """How samples become optimizer steps."""
    optimizer: OptimizerOverrides = OptimizerOverrides()
    """AdamW and its learning rate."""
    trainer: Trainer = Trainer()
    """The machines and how they compute."""
    prepared_data: PreparedData | None = None
    """Where tokenised data is kept."""
    checkpoints: Checkpoints
    """Where the job's results are kept, and how often its state."""
    scheduling: Scheduling = Scheduling()
    """How the pods of the gang get onto nodes."""
    lifecycle: Lifecycle = Lifecycle()
    """What is done about failures, time and leftovers. May change while the job runs."""
    suspend: bool = False
    """True: stop after a committed checkpoint and give the nodes back; false again: go on from there. May change while
    the job runs."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of the order of samples, of the split and of whatever else is random."""
