"""One rank of a gang, from its start to its end."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sft_api.run import RunConfig
from sft_trainer.engine import init_distributed
from sft_trainer.job import COLLECTIVE_TIMEOUT, Progress, assemble
from sft_trainer.ranks import Ranks
from sft_trainer.stopping import StopFlag
from sft_trainer.train import train


def run_rank(
    config: RunConfig, attempt: int, model_folder: Path, work: Path, stop: StopFlag, progress: Progress
) -> str:
    """Join the gang and train; returns what was achieved, in a sentence. `progress` is kept current for the account."""
    on_gpu = config.trainer.gpus_per_node > 0 and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if not on_gpu:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world, local_rank = init_distributed(device, COLLECTIVE_TIMEOUT)
    ranks = Ranks(rank, world, local_rank, device)
    job = assemble(config, attempt, model_folder, work, ranks, progress)
    try:
        train(job, stop)
    finally:
        job.signals.close()
    return f"trained {job.schedule.total_steps:,} steps; results are under {config.checkpoints.uri}"
