"""Positions and learning rates: exact counts, no step without learning, resuming is a seek."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import pytest

from sft_api.run import ExitCode, Lengths, ResolvedBatch, ResolvedOptimizer, ResolvedPhase, RunError
from sft_api.spec import DataFormat, DataSource, LearningRateSchedule, OptimizerState, Overlong, Warmup
from sft_trainer.schedule import Cursor, Schedule

RATE = 2e-5


def make_phase(
    index: int = 0,
    *,
    batch_size: int = 10,
    epochs: int = 2,
    warmup: Warmup | None = None,
    schedule: LearningRateSchedule = LearningRateSchedule.CONSTANT,
) -> ResolvedPhase:
    fields: dict[str, Any] = {
        "name": f"phase-{index}",
        "data": [DataSource(uri="file://data.jsonl", format=DataFormat.MESSAGES)],
        "data_paths": [f"spec.phases[{index}].data[0].uri"],
        "lengths": Lengths.ALL,
        "epochs": epochs,
        "batch": ResolvedBatch(
            effective_batch_size=batch_size,
            max_tokens_per_gpu=4096,
            max_sequence_length=4096,
            overlong=Overlong.TRUNCATE,
        ),
        "optimizer": ResolvedOptimizer(
            learning_rate=RATE,
            schedule=schedule,
            warmup=warmup or Warmup(steps=0),
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0,
            max_grad_norm=1,
            state=OptimizerState.KEEP,
        ),
    }
    return ResolvedPhase(**fields)


def rates(schedule: Schedule, phase: int = 0) -> list[float]:
    return [schedule.learning_rate(phase, step) / RATE for step in range(schedule.phases[phase].total_steps)]


def walk(schedule: Schedule) -> list[Cursor]:
    """All positions from start to done, with steps of two samples, five tokens and three loss tokens."""
    cursors = [schedule.start()]
    while not schedule.is_done(cursors[-1]):
        cursors.append(schedule.after(cursors[-1], 2, 5, 3))
    return cursors


def test_the_last_step_of_an_epoch_takes_the_remainder() -> None:
    (phase,) = Schedule([make_phase(batch_size=10, epochs=3)], [101]).phases
    assert (phase.steps_per_epoch, phase.total_steps) == (11, 33)
    (phase,) = Schedule([make_phase(batch_size=10, epochs=3)], [100]).phases
    assert (phase.steps_per_epoch, phase.total_steps) == (10, 30)


def test_a_walk_passes_every_step_of_every_phase_once() -> None:
    schedule = Schedule([make_phase(0, epochs=2), make_phase(1, epochs=1)], [25, 10])
    cursors = walk(schedule)
    assert schedule.total_steps == 7
    assert [(cursor.phase, cursor.epoch, cursor.step_in_epoch) for cursor in cursors] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (0, 1, 0),
        (0, 1, 1),
        (0, 1, 2),
        (1, 0, 0),
        (2, 0, 0),
    ]
    assert [cursor.step for cursor in cursors] == list(range(8))
    assert cursors[-1] == Cursor(phase=2, step=7, samples=14, tokens=35, loss_tokens=21)


def test_a_phase_ends_once_and_only_after_its_last_step() -> None:
    schedule = Schedule([make_phase(0, epochs=2), make_phase(1, epochs=1)], [25, 10])
    cursors = walk(schedule)
    assert [cursor.step for cursor in cursors if schedule.is_phase_end(cursor)] == [6, 7]
    assert [cursor.step for cursor in cursors if schedule.is_done(cursor)] == [7]


def test_the_step_in_a_phase_counts_through_its_epochs() -> None:
    schedule = Schedule([make_phase(0, epochs=2), make_phase(1, epochs=1)], [25, 10])
    assert [schedule.step_in_phase(cursor) for cursor in walk(schedule)[:-1]] == [0, 1, 2, 3, 4, 5, 0]


def test_a_run_goes_on_from_a_cursor_that_was_kept_as_json() -> None:
    schedule = Schedule([make_phase(0, epochs=2), make_phase(1, epochs=1)], [25, 10])
    cursors = walk(schedule)
    for before, after in pairwise(cursors):
        kept = json.dumps(dataclasses.asdict(before))
        assert schedule.after(Cursor(**json.loads(kept)), 2, 5, 3) == after


def test_a_warm_up_rises_from_the_first_step_and_reaches_the_rate() -> None:
    schedule = Schedule([make_phase(warmup=Warmup(steps=4))], [30])
    assert rates(schedule) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates(Schedule([make_phase()], [30])) == [1] * 6


def test_a_linear_decay_ends_one_step_above_zero() -> None:
    phase = make_phase(warmup=Warmup(steps=2), schedule=LearningRateSchedule.LINEAR)
    assert rates(Schedule([phase], [30])) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


def test_a_cosine_decay_is_half_way_down_in_the_middle() -> None:
    phase = make_phase(warmup=Warmup(steps=2), schedule=LearningRateSchedule.COSINE)
    expected = [0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]
    assert rates(Schedule([phase], [30])) == pytest.approx(expected)


@pytest.mark.parametrize("kind", list(LearningRateSchedule))
@pytest.mark.parametrize("warmup", [0, 1, 5, 6])
def test_no_step_has_a_learning_rate_of_zero(kind: LearningRateSchedule, warmup: int) -> None:
    curve = rates(Schedule([make_phase(warmup=Warmup(steps=warmup), schedule=kind)], [30]))
    assert all(0 < rate <= 1 for rate in curve)
    assert curve[:warmup] == sorted(curve[:warmup])
    assert curve[warmup:] == sorted(curve[warmup:], reverse=True)


def test_each_phase_has_a_schedule_of_its_own() -> None:
    phases = [
        make_phase(0, schedule=LearningRateSchedule.LINEAR),
        make_phase(1, epochs=1, warmup=Warmup(steps=2), schedule=LearningRateSchedule.CONSTANT),
    ]
    schedule = Schedule(phases, [10, 30])
    assert rates(schedule, 0) == pytest.approx([1, 0.5])
    assert rates(schedule, 1) == pytest.approx([0.5, 1, 1])


@pytest.mark.parametrize(
    ("ratio", "steps", "expected"), [(0.03, 100, 3), (0.07, 100, 7), (0.03, 10, 1), (0.0, 10, 0), (0.999, 10, 10)]
)
def test_a_warm_up_ratio_is_rounded_up_to_steps(ratio: float, steps: int, expected: int) -> None:
    (phase,) = Schedule([make_phase(warmup=Warmup(ratio=ratio), batch_size=1, epochs=1)], [steps]).phases
    assert phase.warmup_steps == expected


def refusal(phases: list[ResolvedPhase], num_samples: list[int]) -> RunError:
    with pytest.raises(RunError) as refused:
        Schedule(phases, num_samples)
    return refused.value


def test_a_warm_up_longer_than_its_phase_is_refused() -> None:
    error = refusal([make_phase(warmup=Warmup(steps=7))], [30])
    assert error.code is ExitCode.CONFIGURATION
    assert str(error) == (
        "spec.optimizer.warmup.steps: 7 steps of warm-up are more than phase phase-0 has: 6 (30 samples, 10 a step, "
        "2 epochs). Allowed are 0 to 6; shorten the warm-up or train longer"
    )


def test_a_batch_larger_than_its_phase_is_refused() -> None:
    error = refusal([make_phase(batch_size=3_840)], [1_000])
    assert error.code is ExitCode.CONFIGURATION
    assert str(error) == (
        "spec.batch.effectiveBatchSize: 3,840 samples a step are more than phase phase-0 has: 1,000. Allowed are 1 to "
        "1,000; make the batch smaller or add data"
    )


def test_a_batch_of_all_the_samples_is_one_step_an_epoch() -> None:
    assert Schedule([make_phase(batch_size=1_000)], [1_000]).phases[0].steps_per_epoch == 1


def test_a_value_that_all_phases_share_is_refused_at_the_jobs_field() -> None:
    assert refusal([make_phase(0), make_phase(1)], [30, 9]).path == "spec.batch.effectiveBatchSize"


def test_a_value_of_one_phase_alone_is_refused_at_the_phases_field() -> None:
    phases = [make_phase(0), make_phase(1, batch_size=50, warmup=Warmup(steps=50))]
    assert refusal(phases, [30, 49]).path == "spec.phases[1].batch.effectiveBatchSize"
    assert refusal(phases, [30, 50]).path == "spec.phases[1].optimizer.warmup.steps"


def test_a_phase_without_samples_is_refused() -> None:
    error = refusal([make_phase(0), make_phase(1)], [30, 0])
    assert error.code is ExitCode.DATA
    assert str(error) == (
        "spec.phases[1].data[0].uri: phase phase-1 has no samples to train on. Give it data, or leave the phase out"
    )
