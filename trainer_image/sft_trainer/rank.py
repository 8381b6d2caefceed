"""One rank of a gang, from its start to its end."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sft_api.run import ExitCode, RunConfig, RunError
from sft_trainer.engine import init_distributed
from sft_trainer.heartbeat import Heartbeat
from sft_trainer.job import Job, Workplace, assemble, collective_timeout, open_signals, telling_what_would_fit
from sft_trainer.ranks import Ranks
from sft_trainer.stopping import StopFlag, Stopping
from sft_trainer.told import AsTold, read_config
from sft_trainer.train import Progress, train


def run_rank(
    run: Path, attempt: int, model_folder: Path, work: Path, flag: StopFlag, heartbeat: Heartbeat, progress: Progress
) -> str:
    """Join the gang and train; returns what was achieved, in a sentence. `progress` is kept current for the account.

    `attempt`: its number, from the first rank; the others are told by it.
    """
    config = read_config(run)
    ranks = join(config)
    attempt = int(ranks.gather([attempt])[0, 0])
    signals = open_signals(config, attempt, work, ranks)
    stop = Stopping(flag, ranks)
    try:
        job = assemble(config, model_folder, Workplace(ranks, attempt, work, signals, heartbeat, stop, AsTold(run)))
        carry_out(job, progress)
    finally:
        signals.close()
    return f"trained {job.schedule.total_steps:,} steps; results are under {config.checkpoints.uri}"


def join(config: RunConfig) -> Ranks:
    device = choose_device(config)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return Ranks(*init_distributed(device, collective_timeout(config)), device)


def carry_out(job: Job, progress: Progress) -> None:
    try:
        with telling_what_would_fit(job.footprint, job.stage):
            train(job, progress)
    except RunError as error:
        if error.code is ExitCode.DIVERGED:  # on all ranks alike, and a save on its way is from before
            job.saver.wait()
        raise
    finally:
        progress.checkpoint_step = job.saver.committed_step


def choose_device(config: RunConfig) -> torch.device:
    """This rank's GPU, or the CPU where the job asks for none."""
    if config.trainer.gpus_per_node == 0:
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise RunError(
            ExitCode.CONFIGURATION,
            f"local rank {local_rank} needs a GPU of its own and {visible} can be seen here; 0 trains on the CPU",
            path="spec.trainer.gpusPerNode",
        )
    return torch.device("cuda", local_rank)
