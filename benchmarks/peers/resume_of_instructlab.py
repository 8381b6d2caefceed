"""instructlab-training's own training loop, interrupted and resumed as it does: a peer of `benchmarks.resume`.

`main_ds.train` is run as it is installed, with its loader, sampler, collator, loss, `load_latest_full_state` and
`save_checkpoint`. Its `main` wants a GPU, so what it does before (main_ds.py:536-703) is done here, on the CPU: one
rank over gloo, accelerate without DeepSpeed or FSDP, fp32; where the loop asks CUDA for its memory or a device, it is
told of the CPU. Its defaults: a full state after every epoch (config.py:248) is all that it can resume from, since
`save_samples` writes weights alone; with `stop` it saves on demand (on_demand_checkpoint.py), which is off by default.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate import Accelerator as Accelerate
from instructlab.training import main_ds
from instructlab.training.accelerator import Accelerator
from instructlab.training.batch_loss_manager import BatchLossManager
from instructlab.training.config import DistributedBackend
from instructlab.training.model import CausalLMModel, setup_optimizer
from instructlab.training.on_demand_checkpoint import write_trigger_file
from instructlab.training.padded_batch_packer import batch_lengths_to_minibatches_padded
from instructlab.training.sampler import get_data_loader
from instructlab.training.utils import load_latest_full_state, set_random_seed

from benchmarks.peers.attempts import Attempt, How, Samples, Task, carry_out, parameters_digest
from sft_trainer.fetch import fetch_model
from sft_trainer.preparation import cache_folder
from sft_trainer.tokenizer import load_tokenizer


class WatchedState(Accelerate):  # type: ignore[misc]
    """Tells of full states, and what they are called."""

    attempt: Attempt

    def save_state(self, output_dir: Any = None, **options: Any) -> Any:
        saved = super().save_state(str(output_dir), **options)
        self.attempt.note("save", checkpoint=str(output_dir))
        self.attempt.in_save()  # its metadata would come next
        return saved

    def load_state(self, input_dir: Any = None, **options: Any) -> None:
        super().load_state(str(input_dir), **options)
        self.attempt.note("load", checkpoint=str(input_dir))


class Watched(Accelerator):  # type: ignore[misc]
    """Tells of optimizer steps."""

    def __init__(self, model: CausalLMModel, loader: Any, attempt: Attempt):
        """As Accelerator.__init__ (accelerator.py:31-85), with neither DeepSpeed nor FSDP."""
        self.accelerator = WatchedState(cpu=True)
        self.accelerator.even_batches = False
        self.accelerator.attempt = self.attempt = attempt
        self.train_loader, self.save_samples, self.grad_accum = loader, 0, 1
        self.model = model
        self.model.update_model(self.accelerator.prepare(model.model))
        self.entered: list[int] = []

    def take_optimizer_step(self) -> None:
        super().take_optimizer_step()
        self.attempt.step(self.train_loader.sampler.epoch, self.entered)


class WatchedLoss(BatchLossManager):  # type: ignore[misc]
    """Tells what enters the model, on the CPU."""

    samples: Samples

    def process_batch(self, batch: list[dict[str, Any]], interrupt_check: Any = None) -> Any:
        self.torch_device = torch.device("cpu")
        self.accelerator.attempt.in_step(write_trigger_file)  # which its launcher writes on SIGTERM
        self.accelerator.entered = [
            sample for part in batch for sample in self.samples.rows(part["input_ids"], part["attention_mask"])
        ]
        return super().process_batch(batch, interrupt_check)


def run(attempt: Attempt) -> None:
    torch.set_num_threads(1)
    torch.cuda.memory_stats = lambda *_: {"num_alloc_retries": 0}
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    task, config = attempt.task, attempt.task.config
    samples = Samples(config)
    WatchedLoss.samples = samples
    main_ds.BatchLossManager = WatchedLoss
    os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "CHECKPOINT_TRIGGER_FILENAME": f"resume-{os.getpid()}"}
    dist.init_process_group("gloo", init_method=f"file://{task.work}/rendezvous-{os.getpid()}", rank=0, world_size=1)

    args = arguments(task)
    set_random_seed(args.seed)
    folder = fetch_model(config.model, cache_folder() / "models")
    model = CausalLMModel(
        model_path=str(folder),
        output_dir=args.output_dir,
        distributed_framework=DistributedBackend.FSDP,  # its optimizer is torch's AdamW
        noise_alpha=None,
        tokenizer=load_tokenizer(folder, config.model),
        flash_enabled=False,
    )
    batch = config.phases[0].batch
    loader, _ = get_data_loader(
        data_path=str(data_file(task, samples)),
        batch_size=batch.effective_batch_size,
        max_tokens_per_gpu=batch.max_tokens_per_gpu,
        seed=args.seed,
        rank=0,
        world_size=1,
        flash_enabled=False,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    accelerator = Watched(model, loader, attempt)
    rate = config.phases[0].optimizer.learning_rate
    optimizer = setup_optimizer(model, cpu_offload=False, name=None, learning_rate=rate)
    accelerator.prepare_with_optimizer(optimizer, lr_scheduler="cosine", num_epochs=args.num_epochs, num_warmup_steps=0)
    load_latest_full_state(args=args, accelerator=accelerator)
    main_ds.train(args, model, accelerator, on_demand_checkpointing=task.how is How.STOP)
    if not attempt.is_told:
        attempt.note("finish", digest=parameters_digest(accelerator.model.module.named_parameters()))


def arguments(task: Task) -> argparse.Namespace:
    """What its command line would hold (main_ds.py:1120-1388); where it says nothing, the defaults of its config."""
    return argparse.Namespace(
        output_dir=str(task.work / "instructlab"),
        num_epochs=task.config.phases[0].epochs,
        current_epoch=0,
        last_step=0,
        save_samples=0,
        save_samples_ds=None,
        save_last=False,
        checkpoint_at_epoch=True,
        accelerate_full_state_at_epoch=True,
        keep_last_checkpoint_only=False,
        distributed_training_framework="fsdp",
        model_type="llama",
        lora_r=0,
        seed=42,
    )


def data_file(task: Task, samples: Samples) -> Path:
    """The prepared samples as it wants them when they are tokenised already."""
    path = task.work / "data.jsonl"
    if not path.exists():
        with path.open("w") as file:
            for index in range(len(samples.dataset)):
                ids, is_target = (column.tolist() for column in samples.dataset.tokens(index))
                labels = [token if scored else -100 for token, scored in zip(ids, is_target, strict=True)]
                file.write(json.dumps({"input_ids": ids, "labels": labels, "len": len(ids)}) + "\n")
    return path


if __name__ == "__main__":
    datasets.disable_progress_bars()
    batch_lengths_to_minibatches_padded([1], 1, 1, 0)  # compiled once, for all attempts
    carry_out(run)
