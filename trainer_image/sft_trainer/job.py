"""A rank's job, put together: model, data, schedule, engine, checkpoints and signals, at the position to go on from."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from sft_api.events import Message, PhasePlan, Started
from sft_api.run import ExitCode, RunConfig, RunError
from sft_api.spec import Packing, Precision
from sft_api.status import CheckpointStatus, PhaseStatus, Progress
from sft_trainer.attention import choose_attention, padded_attention
from sft_trainer.balance import Balance
from sft_trainer.engine import Engine, as_run_error
from sft_trainer.exports import Exports
from sft_trainer.heartbeat import Heartbeat
from sft_trainer.loss import PackedLM
from sft_trainer.memory import STAGES, Footprint, advice
from sft_trainer.model import ModelNumbers, load_model, model_numbers
from sft_trainer.plan import Packer
from sft_trainer.preparation import job_store, prepared_job
from sft_trainer.progress import Reporter, percent, utc
from sft_trainer.ranks import Ranks
from sft_trainer.saving import Saver
from sft_trainer.schedule import Cursor, Schedule
from sft_trainer.signals import Monitor, NoSignals, Signals
from sft_trainer.split import PhaseData, open_data
from sft_trainer.stopping import Stopping
from sft_trainer.tokenizer import load_tokenizer
from sft_trainer.validation import Validation

START_PATIENCE_SECONDS = 3600.0
"""How long a rank may load, choose and restore."""


@dataclass(frozen=True)
class Workplace:
    """What a rank has before its job is put together."""

    ranks: Ranks
    attempt: int
    work: Path
    """A folder of this attempt, on this machine."""
    signals: Signals
    heartbeat: Heartbeat
    stop: Stopping
    told: Callable[[], RunConfig]
    """The resolved job as it is now; what may change while it runs is asked of this, the rest of `config`."""


@dataclass
class Job:
    """Everything that `train` walks through; each part is what its module says."""

    config: RunConfig
    ranks: Ranks
    numbers: ModelNumbers
    engine: Engine
    balance: Balance | None
    packer: Packer
    data: list[PhaseData]
    schedule: Schedule
    validation: Validation
    saver: Saver
    exports: Exports
    signals: Signals
    heartbeat: Heartbeat
    stop: Stopping
    told: Callable[[], RunConfig]
    footprint: Footprint
    stage: int
    cursor: Cursor

    @property
    def loss_guard(self) -> float:
        """The largest loss of a run that has not diverged, as this rank was told; the first rank's counts."""
        limit = self.told().loss_guard
        return math.inf if limit is None else limit

    def validate(self, step: int, phase: str) -> float | None:
        """Score the held-out data, if there is any; collective. The loss, or None where told to stop on the way."""
        if not self.validation.parts:
            return None
        metrics = self.validation.score(self.engine, self.ranks, step, phase, self.stop, self.heartbeat)
        if metrics is None:
            return None
        guard(f"the held-out data after step {step}", metrics.loss, self.ranks.gather([self.loss_guard])[0, 0])
        self.signals.emit(metrics)
        return metrics.loss


def guard(what: str, loss: float, limit: float, grad_norm: float = 0.0, skipped: bool = False) -> None:
    """Raises RunError(DIVERGED) before anything is kept of `what` if its loss is above the limit or not finite."""
    if skipped or not math.isfinite(loss) or not math.isfinite(grad_norm):
        gradient = f" and gradient norm {grad_norm}" if grad_norm else ""
        found = f"{what} has loss {loss}{gradient}"
        advice = (
            "lower spec.optimizer.learningRate or spec.optimizer.maxGradNorm, or look for broken samples or weights"
        )
    elif loss > limit:
        found = f"{what} has loss {loss:.4g}, above spec.lifecycle.lossGuard {limit:g}"
        advice = "lower spec.optimizer.learningRate, look for broken samples, or raise spec.lifecycle.lossGuard"
    else:
        return
    raise RunError(
        ExitCode.DIVERGED,
        f"{found}: the run has diverged. The checkpoints are from before it; {advice}",
    )


def assemble(config: RunConfig, model_folder: Path, workplace: Workplace) -> Job:
    """Load, choose and restore until the next step can be taken; collective."""
    ranks, signals, heartbeat, stop = workplace.ranks, workplace.signals, workplace.heartbeat, workplace.stop
    heartbeat.beat("loading the model", START_PATIENCE_SECONDS)
    stop.before_training()
    torch.manual_seed(config.seed + ranks.rank)
    store, prepared = job_store(config), prepared_job(config)
    tokenizer = load_tokenizer(model_folder, config.model)
    bf16 = config.trainer.precision is Precision.BF16
    model = load_model(model_folder, config.model, tokenizer, config.trainer.precision, config.seed)
    model.to(ranks.device)
    numbers = model_numbers(model.config)
    stop.before_training()
    packing, attention, why = choose_packing(config, model, ranks)
    if config.trainer.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    data, held_out = open_data(config, prepared)
    schedule = Schedule(config.phases, [len(phase.samples) for phase in data])
    footprint = footprint_of(config, numbers, ranks)
    stage = choose_stage(config, footprint)
    padded = packing is Packing.PADDED
    packer = Packer(ranks.world, stage > 1, padded, numbers.quadratic_length)
    validation = Validation(
        held_out,
        config.validation.every if config.validation else None,
        replace(packer, equal_counts=True),
        max(phase.batch.max_tokens_per_gpu for phase in config.phases),
    )
    packed = PackedLM(model)
    with telling_what_would_fit(footprint, stage):
        engine = Engine(
            packed,
            stage=stage,
            bf16=bf16,
            optimizer=config.phases[0].optimizer,
            device=ranks.device,
            timeout=collective_timeout(config),
            prefix="model.",
        )
    stop.before_training()
    for notice in packed.notices:
        signals.emit(Message(level="warning", text=notice))
    heartbeat.beat("restoring the newest checkpoint", START_PATIENCE_SECONDS)
    saver = Saver(
        config,
        store,
        workplace.attempt,
        prepared,
        stage,
        schedule,
        ranks,
        signals,
        heartbeat,
        workplace.work,
        lambda: workplace.told().checkpoints.keep,
    )
    cursor = saver.restore(engine)
    stop.before_training()
    exports = Exports(config, store, ranks, model, tokenizer, workplace.work, signals, heartbeat)
    signals.emit(
        Started(
            attempt=workplace.attempt,
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
    signals.know(**position(schedule, cursor, saver))
    return Job(
        config,
        ranks,
        numbers,
        engine,
        packed.balance,
        packer,
        data,
        schedule,
        validation,
        saver,
        exports,
        signals,
        heartbeat,
        stop,
        workplace.told,
        footprint,
        stage,
        cursor,
    )


def position(schedule: Schedule, cursor: Cursor, saver: Saver) -> dict[str, object]:
    """What the report says before the first step of this attempt: how far the attempts before it came."""
    index = min(cursor.phase, len(schedule.phases) - 1)
    phase = schedule.phases[index]
    progress = Progress(
        step=cursor.step,
        total_steps=schedule.total_steps,
        epoch=min(cursor.epoch + 1, phase.epochs) if cursor.phase == index else phase.epochs,
        samples=cursor.samples,
        tokens=cursor.tokens,
        percent=percent(cursor.step, schedule.total_steps),
        heartbeat=utc(time.time()),
    )
    facts: dict[str, object] = {
        "phase": PhaseStatus(name=phase.name, index=index, count=len(schedule.phases)),
        "progress": progress,
        "productive_seconds": saver.productive_seconds,
    }
    if (found := saver.resumed) is not None:  # its checksums were read when it was found
        at, meta = utc(found.committed), found.meta
        facts["checkpoint"] = CheckpointStatus(uri=found.uri, step=meta.step, phase=meta.phase, time=at, verified=True)
    return facts


def choose_packing(config: RunConfig, model: PreTrainedModel, ranks: Ranks) -> tuple[Packing, str, str]:
    """Packed where the attention keeps samples apart, else padded; with the attention and why it was taken."""
    asked, reasons = config.packing, []
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
        reasons.append(choice.reason)
    choice = padded_attention(model, config.trainer.attention)
    return Packing.PADDED, choice.backend, "; ".join([*reasons, choice.reason])


def footprint_of(config: RunConfig, numbers: ModelNumbers, ranks: Ranks) -> Footprint:
    """Collective: the memory is that of the rank with the least."""
    batches = [phase.batch for phase in config.phases]
    return Footprint(
        numbers,
        ranks.world,
        max(batch.max_tokens_per_gpu for batch in batches),
        max(batch.max_sequence_length for batch in batches),
        config.trainer.precision is Precision.BF16,
        config.trainer.activation_checkpointing,
        int(ranks.gather([available_memory(ranks.device)]).min()),
    )


def choose_stage(config: RunConfig, footprint: Footprint) -> int:
    """The ZeRO stage asked for, or the lowest that fits in every rank's memory."""
    stage = config.trainer.zero_stage or footprint.need.lowest_that_fits(footprint.available)
    if stage is None:
        needed = footprint.need.by_stage[STAGES[-1]] / 1e9
        raise RunError(
            ExitCode.OUT_OF_MEMORY,
            f"the model needs {needed:.1f} GB on each rank with ZeRO {STAGES[-1]}: {advice(footprint, None)}",
        )
    return stage


@contextmanager
def telling_what_would_fit(footprint: Footprint, stage: int) -> Iterator[None]:
    """Inside, running out of memory is a RunError that says what would fit."""
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, RunError) else as_run_error(error)
        if known is None or known.code is not ExitCode.OUT_OF_MEMORY:
            raise
        raise RunError(known.code, f"{known.message}: {advice(footprint, stage)}") from error


def available_memory(device: torch.device) -> float:
    """Bytes this rank may use: of its device, on the CPU its share of what is free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def collective_timeout(config: RunConfig) -> timedelta:
    """How long a rank waits for the others in one collective. The launcher's watchdog speaks before."""
    return timedelta(seconds=max(config.hang_timeout_seconds, START_PATIENCE_SECONDS) + 600)


def open_signals(config: RunConfig, attempt: int, work: Path, ranks: Ranks) -> Signals:
    """The first rank's; it serves them from now on where a port is given."""
    if not ranks.is_first:
        return NoSignals()
    reporter = Reporter(attempt, work)
    monitor = Monitor(config.name, reporter)
    if port := os.environ.get("SFT_METRICS_PORT"):
        monitor.serve(int(port), os.environ.get("SFT_METRICS_ADDRESS", "127.0.0.1"))
    return Signals(job_store(config), attempt, monitor, reporter)
