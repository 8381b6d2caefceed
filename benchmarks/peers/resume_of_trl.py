"""TRL's SFTTrainer, interrupted and resumed by `resume_from_checkpoint=True`: a peer of `benchmarks.resume`.

Settings are TRL's defaults but for those that make it comparable (batch, epochs, length, rate, a checkpoint every so
many steps) and possible here (CPU, fp32, no activation checkpointing, no reports). With `stop` its
`enable_jit_checkpoint` is on, which is off by default.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.attempts import Attempt, How, Samples, Task, carry_out, parameters_digest
from benchmarks.peers.sft_trainer_of_trl import columns
from sft_trainer.fetch import fetch_model
from sft_trainer.model import load_model
from sft_trainer.preparation import cache_folder
from sft_trainer.tokenizer import load_tokenizer

MICRO_BATCH = 8
"""Samples, without packing. With it a micro-batch is one pack."""


class Watched(SFTTrainer):  # type: ignore[misc]
    """Tells what enters the model, what is loaded and when it saves."""

    attempt: Attempt
    samples: Samples
    entered: list[int]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **options: Any) -> Any:
        if not self.entered:
            self.attempt.in_step(self.stop)
        if "attention_mask" in inputs:
            self.entered += self.samples.rows(inputs["input_ids"], inputs["attention_mask"])
        else:
            self.entered += self.samples.packed(inputs["input_ids"], inputs["position_ids"])
        return super().compute_loss(model, inputs, *others, **options)

    def stop(self) -> None:
        """SIGTERM; the step lasts until transformers has waited as long as it always does before it saves."""
        jit = next(one for one in self.callback_handler.callbacks if isinstance(one, JITCheckpointCallback))
        os.kill(os.getpid(), signal.SIGTERM)
        while not jit.jit_manager.is_checkpoint_requested:
            time.sleep(0.1)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *others: Any, **options: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *others, **options)
        self.attempt.note("load", checkpoint=resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.attempt.note("save", checkpoint=output_dir)
        self.attempt.in_save()  # the optimizer and the trainer's state would come next
        super()._save_optimizer_and_scheduler(output_dir)


class Steps(TrainerCallback):  # type: ignore[misc]
    """Notes every optimizer step with what entered it, as soon as it is taken and before anything can be saved."""

    def __init__(self) -> None:
        self.trainer: Watched | None = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        epoch = state.global_step // (state.max_steps // int(args.num_train_epochs))
        self.trainer.attempt.step(epoch, self.trainer.entered)
        self.trainer.entered = []


def run(attempt: Attempt) -> None:
    torch.set_num_threads(1)
    task, config = attempt.task, attempt.task.config
    folder = fetch_model(config.model, cache_folder() / "models")
    tokenizer = load_tokenizer(folder, config.model)
    model = load_model(folder, config.model, tokenizer, config.trainer.precision, config.seed)
    model.set_attn_implementation("sdpa")
    samples, steps = Samples(config), Steps()
    trainer = Watched(
        model=model,
        args=settings(task, samples),
        train_dataset=columns(samples.dataset),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    trainer.attempt, trainer.samples, trainer.entered, steps.trainer = attempt, samples, [], trainer
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir) is not None)
    if not attempt.is_told:
        attempt.note("finish", digest=parameters_digest(trainer.model.named_parameters()))


def settings(task: Task, samples: Samples) -> SFTConfig:
    batch = task.config.phases[0].batch
    accumulation = batch.effective_batch_size // MICRO_BATCH
    if task.packing:
        tokens_per_step = samples.dataset.lengths.mean() * batch.effective_batch_size
        accumulation = max(1, round(tokens_per_step / batch.max_sequence_length))
    (task.work / "trl").mkdir(exist_ok=True)
    return SFTConfig(
        output_dir=str(task.work / "trl"),
        packing=task.packing,
        max_length=batch.max_sequence_length,
        per_device_train_batch_size=1 if task.packing else MICRO_BATCH,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=task.config.phases[0].epochs,
        learning_rate=task.config.phases[0].optimizer.learning_rate,
        save_steps=task.save_steps,
        enable_jit_checkpoint=task.how is How.STOP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    carry_out(run)
