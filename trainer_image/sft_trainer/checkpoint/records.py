"""The JSON files of a checkpoint, and the names of its files. What they say is checked when they are read."""

from __future__ import annotations

from typing import Literal

from sft_api.base import ApiModel


class CheckpointMeta(ApiModel):
    """Where training stood and under what it ran, as the trainer gives it to a save."""

    step: int
    """Optimizer steps done, through all phases."""
    phase: str
    """Name of the phase of the step just done."""
    epoch: int
    """Pass over that phase's data; the first is 1."""
    phase_end: bool = False
    """The step was the phase's last."""
    cursor: dict[str, int]
    """The position before the next step, as the schedule knows it."""
    samples: int
    """Samples since the job began; likewise the next two."""
    tokens: int = 0
    loss_tokens: int = 0
    world_size: int
    zero_stage: int
    fingerprints: dict[str, str]
    """What makes this run the one it is: a run with any other value may not go on from here."""
    versions: dict[str, str] = {}
    """Of the libraries."""
    samples_digest: str = ""
    """Of the samples of the step just done."""
    validation_loss: float | None = None
    """Of the held-out data after this step, if it was scored then."""
    to_be_scored: bool = False
    """The held-out data was to be scored after this step, and the run was told to stop before that was done."""
    productive_seconds: float = 0.0
    """Wall time of all steps up to this one, each counted once, whatever attempts took them."""
    time: float
    """Unix time of the save."""


class FileRecord(ApiModel):
    """An object of the checkpoint, as it was written."""

    file: str
    size: int
    """Bytes."""
    sha256: str


class RankManifest(ApiModel):
    """What one rank has uploaded. Its being there says that the upload is done."""

    step: int
    attempt: int
    rank: int
    world_size: int
    fingerprints: dict[str, str]
    shard: FileRecord
    parameters_digest: str
    """The share of this rank's slices; the shares of all ranks add up."""
    coverage: dict[str, tuple[int, int]]
    """For each parameter that this rank holds a slice of: elements in the slice, and in the whole parameter."""


class Manifest(ApiModel):
    """MANIFEST.json: all there is to know about a checkpoint but the state itself."""

    format: Literal[1] = 1
    attempt: int
    meta: CheckpointMeta
    shards: list[FileRecord]
    """One a rank, in the order of ranks."""
    parameters: int
    """Elements of all trainable parameters."""
    parameters_digest: str


class Marker(ApiModel):
    """COMPLETE: the checkpoint is committed, with exactly this manifest."""

    step: int
    attempt: int
    manifest_sha256: str
    writer: str
    """Random: tells a writer whether the marker that it finds is its own."""
    time: float
    """Unix time of the commit."""


def shard_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def rank_manifest_file(rank: int) -> str:
    return f"rank-{rank:05d}.manifest.json"


def writer_file(rank: int) -> str:
    """By whose conditional create the rank's place in the checkpoint is taken."""
    return f"rank-{rank:05d}.writer"
