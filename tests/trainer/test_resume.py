"""Runs that stop, die and move: what they end with is what the undisturbed run ends with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from sft_api.run import ExitCode
from sft_api.spec import OptimizerState
from sft_trainer.checkpoint import complete_places, open_checkpoint
from sft_trainer.state import STATE_KEYS
from sft_trainer.store import Store
from tests.gang import Gangs
from tests.trainer.engine_cases import Whole, largest_relative_deviation, same_bits
from tests.trainer.runs import SPEC, Runs, Script, Told, figures, make_base, same_training

WORLDS = [1, 2]


@pytest.fixture(scope="module")
def runs(gang: Gangs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With dropout: what a resumed run draws has to be what the run would have drawn."""
    base = make_base(tmp_path_factory.mktemp("base"), attention_dropout=0.2)
    return Runs(gang, base, tmp_path_factory.mktemp("runs"))


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves behind."""

    told: Told
    state: Whole
    adam_step: int

    @property
    def last_step(self) -> int:
        return max(self.told.steps)


def outcome(runs: Runs, name: str) -> Outcome:
    told, store = runs.told(name), Store.open(runs.uri(name))
    checkpoint = open_checkpoint(store, *complete_places(store)[0])
    assert checkpoint.meta.step == max(told.steps)
    state: Whole = {
        parameter: {key: checkpoint.read(parameter, key, 0, math.prod(shape)) for key in STATE_KEYS}
        for parameter, shape in checkpoint.shapes().items()
    }
    (adam_step,) = {checkpoint.adam_step(parameter) for parameter in state}
    return Outcome(told, state, adam_step)


def finish(runs: Runs, name: str, world: int = 1, changes: dict[str, Any] | None = None) -> Outcome:
    assert runs.run(name, world, changes).code == ExitCode.COMPLETED
    return outcome(runs, name)


def assert_same(one: Outcome, other: Outcome) -> None:
    """Every number that was reported, every parameter and every moment: the same bits."""
    assert figures(one.told) == figures(other.told)
    assert one.told.digests[one.last_step] == other.told.digests[other.last_step]
    assert one.adam_step == other.adam_step
    assert same_bits(one.state, other.state)


STAGE = {1: 1, 2: 3}
"""The ZeRO stage of the runs on so many ranks."""


def changes_on(world: int) -> dict[str, Any]:
    return {"trainer": {"zeroStage": STAGE[world]}}


@pytest.fixture(scope="module")
def straight(runs: Runs) -> dict[int, Outcome]:
    """Undisturbed runs over two phases of two epochs, by their number of ranks."""
    return {world: finish(runs, f"straight-{world}", world, changes_on(world)) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_that_stops_after_any_step_goes_on_bit_for_bit(
    runs: Runs, straight: dict[int, Outcome], world: int
) -> None:
    for step in list(straight[world].told.steps)[:-1]:
        name = f"stopped-{world}-{step}"
        ending = runs.run(name, world, changes_on(world), Script(stop_in=step))
        assert (ending.code, ending.message) == (
            ExitCode.PREEMPTED,
            f"told to stop: step {step} is committed; run again to go on",
        )
        assert max(runs.told(name).digests) == step
        assert_same(finish(runs, name, world, changes_on(world)), straight[world])


def test_a_run_that_dies_in_any_step_goes_on_bit_for_bit(runs: Runs, straight: dict[int, Outcome]) -> None:
    for step in straight[1].told.steps:
        name = f"dead-{step}"
        assert runs.run(name, script=Script(die_in=step)).code < 0
        assert max(runs.told(name).digests, default=0) < step
        assert_same(finish(runs, name), straight[1])


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_that_never_takes_two_steps_in_a_row_is_the_same_run(
    runs: Runs, straight: dict[int, Outcome], world: int
) -> None:
    name = f"step-by-step-{world}"
    for _ in range(straight[world].last_step - 1):
        assert runs.run(name, world, changes_on(world), Script(stop_in=1)).code == ExitCode.PREEMPTED
    assert_same(finish(runs, name, world, changes_on(world)), straight[world])


def test_a_run_that_dies_again_and_again_ends_with_the_same_parameters(
    runs: Runs, straight: dict[int, Outcome]
) -> None:
    for die_in in (3, 4, 1, 5):
        assert runs.run("dying", script=Script(die_in=die_in)).code < 0
    assert_same(finish(runs, "dying"), straight[1])


@pytest.fixture(scope="module")
def still(gang: Gangs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Without dropout, which each rank would draw for itself."""
    return Runs(gang, make_base(tmp_path_factory.mktemp("still")), tmp_path_factory.mktemp("still-runs"))


@pytest.mark.parametrize("packing", ["Packed", "Padded"])
def test_a_run_goes_on_with_other_ranks_and_stages(still: Runs, packing: str) -> None:
    def changes(stage: int) -> dict[str, Any]:
        return {"trainer": {"zeroStage": stage}, "batch": {"packing": packing}}

    expected = finish(still, f"unmoved-{packing}", 1, changes(1))
    name = f"moved-{packing}"
    for world, stage in ((1, 1), (2, 3), (4, 2)):
        ending = still.run(name, world, changes(stage), Script(stop_in=expected.last_step // 4))
        assert ending.code == ExitCode.PREEMPTED
    moved = finish(still, name, 1, changes(1))
    same_training(moved.told, expected.told, 1e-6)
    assert moved.adam_step == expected.adam_step
    assert largest_relative_deviation(moved.state, expected.state) < 1e-5


@pytest.mark.parametrize("state", list(OptimizerState))
@pytest.mark.parametrize("world", WORLDS)
def test_a_phase_begins_exactly_once_whatever_dies_around_it(
    runs: Runs, straight: dict[int, Outcome], world: int, state: OptimizerState
) -> None:
    phases = [
        {"name": "one", "data": [{"uri": f"file://{runs.base}/one.jsonl"}]},
        {"name": "two", "data": [{"uri": f"file://{runs.base}/two.jsonl"}], "optimizer": {"state": state}},
    ]
    changes = {**changes_on(world), "phases": phases}
    expected = finish(runs, f"phases-{world}-{state}", world, changes)
    steps = expected.told.steps.values()
    first, second = (sum(step.phase == name for step in steps) for name in ("one", "two"))
    assert expected.adam_step == (second if state is OptimizerState.RESET else first + second)

    name, every = f"phases-disturbed-{world}-{state}", SPEC["checkpoints"]["every"]["steps"]
    for script, committed in [
        (Script(die_in=first), first - every),  # trained to its end, and lost
        (Script(stop_at="waiting for a checkpoint to be committed"), first),  # at the end of the phase
        (Script(die_in=1), first),  # the first step of the next one, lost
        (Script(die_in=1), first),
        (Script(stop_in=1), first + 1),
        (Script(die_in=1), first + 1),
        (Script(stop_in=1), first + 2),
    ]:
        assert runs.run(name, world, changes, script).code != ExitCode.COMPLETED
        assert max(runs.told(name).digests) == committed
    assert_same(finish(runs, name, world, changes), expected)
