"""A rank's job, put together: model, data, schedule, engine, checkpoints and signals, at the position to go on from."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from sft_api.events import Message, PhasePlan, Started
from sft_api.run import ExitCode, RunConfig, RunError
from sft_api.spec import Packing, Precision
from sft_trainer.attention import choose_attention, padded_attention
from sft_trainer.engine import Engine
from sft_trainer.exports import Exports
from sft_trainer.loss import PackedLM
from sft_trainer.memory import memory_need
from sft_trainer.model import ModelNumbers, load_model, model_numbers
from sft_trainer.plan import Packer
from sft_trainer.preparation import job_store, prepared_job
from sft_trainer.ranks import Ranks
from sft_trainer.saving import Saver
from sft_trainer.schedule import Cursor, Schedule
from sft_trainer.signals import Monitor, NoSignals, Signals
from sft_trainer.split import PhaseData, open_data
from sft_trainer.store import Store
from sft_trainer.tokenizer import load_tokenizer
from sft_trainer.validation import Validation

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in one collective: longer than the longest export."""


@dataclass
class Job:
    """Everything that `train` walks through; each part is what its module says."""

    config: RunConfig
    ranks: Ranks
    numbers: ModelNumbers
    engine: Engine
    packer: Packer
    data: list[PhaseData]
    schedule: Schedule
    validation: Validation
    saver: Saver
    exports: Exports
    signals: Signals
    cursor: Cursor

    def validate(self, step: int, phase: str) -> float | None:
        """Score the held-out data, if there is any; collective. Returns the loss."""
        if not self.validation.parts:
            return None
        metrics = self.validation.score(self.engine, self.ranks, step, phase)
        if not math.isfinite(metrics.loss):
            raise RunError(
                ExitCode.DIVERGED,
                f"the held-out loss is {metrics.loss} after step {step}: the model is broken. The checkpoints before"
                " it are good; lower spec.optimizer.learningRate, or look for broken samples or base weights",
            )
        self.signals.emit(metrics)
        return metrics.loss


def assemble(config: RunConfig, attempt: int, model_folder: Path, work: Path, ranks: Ranks) -> Job:
    """Load, choose and restore until the next step can be taken; collective."""
    torch.manual_seed(config.seed + ranks.rank)
    store, prepared = job_store(config), prepared_job(config)
    tokenizer = load_tokenizer(model_folder, config.model)
    bf16 = config.trainer.precision is Precision.BF16
    model = load_model(model_folder, config.model, tokenizer, config.trainer.precision, config.seed)
    model.to(ranks.device)
    numbers = model_numbers(model.config)
    packing, attention, why = choose_packing(config, model, ranks)
    if config.trainer.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    data, held_out = open_data(config, prepared)
    schedule = Schedule(config.phases, [len(phase.samples) for phase in data])
    stage = choose_stage(config, numbers, ranks)
    padded = packing is Packing.PADDED
    packer = Packer(ranks.world, stage > 1, padded, numbers.quadratic_length)
    validation = Validation(
        held_out,
        config.validation.every if config.validation else None,
        replace(packer, equal_counts=True),
        max(phase.batch.max_tokens_per_gpu for phase in config.phases),
    )
    packed = PackedLM(model)
    engine = Engine(
        packed,
        stage=stage,
        bf16=bf16,
        optimizer=config.phases[0].optimizer,
        device=ranks.device,
        timeout=COLLECTIVE_TIMEOUT,
        prefix="model.",
    )
    signals = open_signals(config, store, attempt, schedule.total_steps, ranks)
    for notice in packed.notices:
        signals.emit(Message(level="warning", text=notice))
    saver = Saver(config, store, attempt, prepared, stage, schedule, ranks, signals, work)
    cursor = saver.restore(engine)
    exports = Exports(config, store, ranks, model, tokenizer, work, signals)
    signals.emit(
        Started(
            attempt=attempt,
            total_steps=schedule.total_steps,
            phases=[
                PhasePlan(name=phase.name, samples=phase.num_samples, epochs=phase.epochs, steps=phase.total_steps)
                for phase in schedule.phases
            ],
            resumed_from_step=cursor.step if cursor.step else None,
            world_size=ranks.world,
            zero_stage=stage,
            precision=config.trainer.precision.value,
            attention=attention,
            attention_reason=why,
            packing=packing.value,
            parameters=numbers.parameters,
            device=device_name(ranks.device),
        )
    )
    return Job(config, ranks, numbers, engine, packer, data, schedule, validation, saver, exports, signals, cursor)


def choose_packing(config: RunConfig, model: PreTrainedModel, ranks: Ranks) -> tuple[Packing, str, str]:
    """Packed where the attention keeps samples apart, else padded; with the attention and why it was taken."""
    asked = config.packing
    if asked is not Packing.PADDED:
        choice = choose_attention(model, config.trainer.attention, ranks.device)
        if choice.keeps_samples_apart:
            return Packing.PACKED, choice.backend, choice.reason
        if asked is Packing.PACKED:
            raise RunError(
                ExitCode.CONFIGURATION,
                f"{type(model).__name__} cannot be trained packed: {choice.reason}. Set Auto or Padded",
                path="spec.batch.packing",
            )
    choice = padded_attention(model, config.trainer.attention)
    return Packing.PADDED, choice.backend, choice.reason


def choose_stage(config: RunConfig, numbers: ModelNumbers, ranks: Ranks) -> int:
    """The ZeRO stage asked for, or the lowest that fits in this rank's memory."""
    if config.trainer.zero_stage is not None:
        return config.trainer.zero_stage
    need = memory_need(
        numbers,
        ranks.world,
        max(phase.batch.max_tokens_per_gpu for phase in config.phases),
        config.trainer.precision is Precision.BF16,
        config.trainer.activation_checkpointing,
    )
    available = int(ranks.gather([available_memory(ranks.device)]).min())
    stage = need.lowest_that_fits(available)
    if stage is None:
        raise RunError(
            ExitCode.OUT_OF_MEMORY,
            f"the model needs {need.by_stage[3] / 1e9:.1f} GB on each of {ranks.world} ranks with ZeRO 3, and there are"
            f" {available / 1e9:.1f} GB: lower spec.batch.maxTokensPerGPU or use more GPUs",
        )
    return stage


def available_memory(device: torch.device) -> float:
    """Bytes this rank may use: of its device, on the CPU its share of what is free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def open_signals(config: RunConfig, store: Store, attempt: int, total_steps: int, ranks: Ranks) -> Signals:
    if not ranks.is_first:
        return NoSignals()
    monitor = Monitor(config.name, total_steps)
    if port := os.environ.get("SFT_METRICS_PORT"):
        monitor.serve(int(port), os.environ.get("SFT_METRICS_ADDRESS", "127.0.0.1"))
    return Signals(store, attempt, monitor)
