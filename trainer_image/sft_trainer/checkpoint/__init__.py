"""Checkpoints: training state in object storage, committed so that what says COMPLETE is whole. No pickle anywhere.

    ckpt/<step>/<attempt>/
        rank-00000.writer              whose place this is
        rank-00000.safetensors         fp32 masters and moments by parameter, as slices; the rank's random generators
        rank-00000.manifest.json       size, checksum, share of the parameters' digest
        MANIFEST.json                  position, fingerprints, all shards
        COMPLETE                       last

Read in this order: records, shards, staging, commit, writer; reader, catalog; retention, attempts, digest, rng.
"""

from sft_trainer.checkpoint.catalog import (
    CheckpointSummary,
    Damaged,
    complete_places,
    list_checkpoints,
    newest_complete,
    open_checkpoint,
)
from sft_trainer.checkpoint.reader import Checkpoint
from sft_trainer.checkpoint.records import CheckpointMeta
from sft_trainer.checkpoint.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointMeta",
    "CheckpointSummary",
    "CheckpointWriter",
    "Damaged",
    "complete_places",
    "list_checkpoints",
    "newest_complete",
    "open_checkpoint",
]
