"""The training loop, from top to bottom: what happens when. How is in `engine` (DeepSpeed) and `store`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sft_api.events import StepMetrics
from sft_api.run import ExitCode, RunError
from sft_api.spec import OptimizerState
from sft_trainer.balance import weigh_experts
from sft_trainer.batches import Step, StepLoader
from sft_trainer.job import Job, guard
from sft_trainer.schedule import Cursor
from sft_trainer.signals import peak_flops, peak_memory, training_flops


@dataclass
class Progress:
    """How far a rank is, for its account should it fail."""

    step: int | None = None
    checkpoint_step: int | None = None


def train(job: Job, progress: Progress) -> None:
    """Walk the schedule from the job's cursor to its end; collective.

    Returns when all is trained, committed and exported. Raises RunError with PREEMPTED after a committed checkpoint
    when a rank was told to stop, with DIVERGED when a loss or gradient is not finite or a loss above the guard: nothing
    of that step is kept.
    """
    config, ranks, engine, schedule, cursor = job.config, job.ranks, job.engine, job.schedule, job.cursor
    resumed = job.saver.resumed
    if resumed is None:
        job.validate(step=0, phase=config.phases[0].name)
    elif resumed.meta.to_be_scored:
        job.validate(step=cursor.step, phase=resumed.meta.phase)
    job.exports.export_what_is_due(engine, schedule, cursor)

    while not schedule.is_done(cursor):
        job.stop.agree()  # while it was scored or exported
        stop_where_told(job, cursor)
        phase, steps = config.phases[cursor.phase], schedule.phases[cursor.phase]
        # A checkpoint at a phase's start is from before this line, one in its middle from after it: Adam's state is
        # reset exactly once, however often the run is resumed.
        keeps = phase.optimizer.model_copy(update={"state": OptimizerState.KEEP})
        engine.configure(phase.optimizer if schedule.step_in_phase(cursor) == 0 else keeps)
        loader = StepLoader(job.data[cursor.phase], job.packer, ranks.rank, ranks.device, config.seed, cursor.phase)

        for step in loader.steps(cursor.epoch, cursor.step_in_epoch, steps.epochs, steps.steps_per_epoch):
            # ----------------------------------------------------------------------------------------------------
            started = time.perf_counter() - step.wait_seconds
            job.heartbeat.beat(f"step {cursor.step + 1} (phase {phase.name})")
            learning_rate = schedule.learning_rate(cursor.phase, schedule.step_in_phase(cursor))
            cross_entropy = torch.zeros((), dtype=torch.float64, device=ranks.device)
            experts = weigh_experts(engine, job.balance, ranks, step)
            for index, micro_batch in enumerate(step.mine):
                # A sum over tokens, divided by the loss tokens of all ranks in this step: the gradient does not
                # depend on how samples were packed or spread.
                loss_sum, _ = engine(**micro_batch, **experts)
                engine.backward(loss_sum / step.num_loss_tokens, last=index + 1 == len(step.mine))
                cross_entropy += loss_sum.detach()
            grad_norm = engine.step(learning_rate)
            before, cursor = cursor, schedule.after(cursor, step.num_samples, step.num_tokens, step.num_loss_tokens)
            # ----------------------------------------------------------------------------------------------------

            # The one collective of ours: what the ranks must know alike to decide alike.
            everyone = share(job, cross_entropy)
            loss = everyone.cross_entropy / step.num_loss_tokens
            guard(f"step {cursor.step}", loss, everyone.loss_guard, grad_norm, engine.skipped)
            progress.step = cursor.step
            metrics = step_metrics(job, step, cursor, phase.name, loss, grad_norm, learning_rate, started, everyone)
            job.saver.productive_seconds += metrics.seconds
            job.signals.emit(metrics)

            saves = job.saver.due(before, cursor, everyone.minutes_are_up)
            scores = job.validation.due(before, cursor) or (saves and everyone.keeps_the_best)
            validation_loss = job.validate(cursor.step, phase.name) if scores else None
            if saves or job.stop.is_agreed:
                unscored = scores and validation_loss is None and job.stop.is_agreed
                job.saver.save(engine, before, cursor, step.digest, validation_loss, unscored)
            stop_where_told(job, cursor)

        job.exports.export_what_is_due(engine, schedule, cursor)
    job.saver.wait()
    job.signals.know(complete=True)


def stop_where_told(job: Job, cursor: Cursor) -> None:
    """End here, with what is on its way committed, if the ranks have agreed to stop; collective."""
    if not job.stop.is_agreed or job.schedule.is_done(cursor):
        return
    job.saver.wait()
    if cursor.step == 0:
        job.stop.before_training()
    raise RunError(ExitCode.PREEMPTED, f"told to stop: step {cursor.step} is committed; run again to go on")


@dataclass(frozen=True)
class Shared:
    """What all ranks know alike after a step."""

    cross_entropy: float
    """Sum over the loss tokens of the step."""
    minutes_are_up: bool
    keeps_the_best: bool
    memory_bytes: int
    """Largest peak memory of a rank."""
    loss_guard: float


def share(job: Job, cross_entropy: Tensor) -> Shared:
    """Make all ranks know what one has to say, whether it was told to stop included; collective."""
    saver = job.saver
    mine = [
        cross_entropy.item(),
        job.stop.mine,
        saver.minutes_are_up(),
        saver.keeps_the_best,
        saver.problem is not None,
        peak_memory(job.ranks.device),
        job.loss_guard,
    ]
    everyone = job.ranks.gather(mine)
    job.stop.hear(everyone[:, 1])
    saver.hear_of_problems(everyone[:, 4])
    return Shared(
        cross_entropy=float(everyone[:, 0].sum()),
        minutes_are_up=bool(everyone[0, 2]),
        keeps_the_best=bool(everyone[0, 3]),
        memory_bytes=int(everyone[:, 5].max()),
        loss_guard=float(everyone[0, 6]),
    )


def step_metrics(
    job: Job,
    step: Step,
    cursor: Cursor,
    phase: str,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    started: float,
    everyone: Shared,
) -> StepMetrics:
    seconds = time.perf_counter() - started
    return StepMetrics(
        step=cursor.step,
        phase=phase,
        epoch=step.epoch + 1,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        samples=cursor.samples,
        tokens=cursor.tokens,
        loss_tokens=cursor.loss_tokens,
        samples_digest=step.digest,
        seconds=seconds,
        tokens_per_second=step.num_tokens / seconds,
        mfu=utilisation(job, step, seconds),
        packing_efficiency=step.plan.efficiency,
        packing_bound=step.plan.bound,
        micro_batches=step.plan.max_micro_batches,
        data_wait_seconds=step.wait_seconds,
        checkpoint_stall_seconds=job.saver.take_stall_seconds(),
        memory_bytes=everyone.memory_bytes,
        time=time.time(),
    )


def utilisation(job: Job, step: Step, seconds: float) -> float | None:
    """Model FLOPs utilisation of one step over all ranks; none where the device's peak is not known."""
    peak = peak_flops(job.ranks.device)
    if peak is None:
        return None
    return training_flops(job.numbers, step.num_tokens, step.squared_lengths) / (seconds * job.ranks.world * peak)
