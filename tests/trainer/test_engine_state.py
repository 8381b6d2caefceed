"""State moves between ZeRO stages and numbers of ranks bit for bit; training goes on as if never stopped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.gang import Gangs
from tests.trainer.engine_cases import (
    Part,
    Whole,
    WholeSource,
    assemble,
    largest_relative_deviation,
    make_module,
    make_samples,
    parts,
    running,
    same_bits,
    take_step,
)

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Snapshot:
    """A rank's parts and, on rank 0, the weights that the forward pass uses."""

    parts: list[Part]
    weights: Weights
    norms: list[float]


def uninterrupted(stage: int, bf16: bool) -> tuple[Snapshot, Snapshot]:
    """The state after two steps and after two more."""
    with running(make_module(), stage, bf16=bf16) as engine:
        snapshots = []
        for first in (0, 2):
            norms = [take_step(engine, make_samples(step, 6), stage, 1e-3 / (1 + step)) for step in (first, first + 1)]
            weights = {name: tensor.float().numpy() for name, tensor in engine.full_state_dict().items()}
            snapshots.append(Snapshot(parts(engine), weights, norms))
        return snapshots[0], snapshots[1]


def resumed(stage: int, bf16: bool, whole: Whole, adam_step: int) -> tuple[Snapshot, Snapshot]:
    """A new engine on other weights takes over the state: what it then holds, and what it holds two steps later."""
    with running(make_module(seed=1), stage, bf16=bf16) as engine:
        engine.restore(WholeSource(whole, adam_step))
        weights = {name: tensor.float().numpy() for name, tensor in engine.full_state_dict().items()}
        loaded = Snapshot(parts(engine), weights, [])
        norms = [take_step(engine, make_samples(step, 6), stage, 1e-3 / (1 + step)) for step in (2, 3)]
        weights = {name: tensor.float().numpy() for name, tensor in engine.full_state_dict().items()}
        return loaded, Snapshot(parts(engine), weights, norms)


class Sources:
    """Uninterrupted runs, each made once."""

    def __init__(self, gang: Gangs):
        self.gang = gang
        self.made: dict[tuple[int, int, bool], list[tuple[Snapshot, Snapshot]]] = {}

    def __call__(self, stage: int, world: int, bf16: bool) -> list[tuple[Snapshot, Snapshot]]:
        key = (stage, world, bf16)
        if key not in self.made:
            self.made[key] = self.gang(world).run(uninterrupted, stage, bf16)
        return self.made[key]


@pytest.fixture(scope="module")
def sources(gang: Gangs) -> Sources:
    return Sources(gang)


def whole_at(answers: list[tuple[Snapshot, Snapshot]], at: int) -> tuple[Whole, int]:
    return assemble([snapshots[at].parts for snapshots in answers])


def same_weights(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# Every stage and world size is a source and a target, and each kind of optimizer hands over to each other.
ELSEWHERE = [
    # source (stage, world), target (stage, world), bf16
    ((1, 1), (2, 2), False),
    ((1, 2), (3, 3), False),
    ((1, 3), (3, 1), False),
    ((2, 1), (1, 3), False),
    ((2, 2), (3, 2), False),
    ((2, 3), (1, 2), False),
    ((3, 1), (1, 1), False),
    ((3, 2), (2, 1), False),
    ((3, 3), (2, 3), False),
    ((1, 2), (3, 1), True),
    ((3, 2), (1, 3), True),
    ((2, 2), (1, 2), True),
]


@pytest.mark.parametrize(("source", "target", "bf16"), ELSEWHERE)
def test_another_stage_or_number_of_ranks_takes_over_every_bit(
    gang: Gangs, sources: Sources, source: tuple[int, int], target: tuple[int, int], bf16: bool
) -> None:
    straight = sources(*source, bf16)
    saved, adam_step = whole_at(straight, 0)
    answers = gang(target[1]).run(resumed, target[0], bf16, saved, adam_step)
    loaded, loaded_step = whole_at(answers, 0)
    assert loaded_step == adam_step == 2
    assert same_bits(loaded, saved)
    assert same_weights(answers[0][0].weights, straight[0][0].weights)
    if not bf16:  # in bf16 the weights' own rounding makes any two runs differ by percents
        later, later_step = whole_at(answers, 1)
        assert later_step == 4
        assert largest_relative_deviation(later, whole_at(straight, 1)[0]) < 1e-5
        assert answers[0][1].norms == pytest.approx(straight[0][1].norms, rel=1e-5)


@pytest.mark.parametrize(
    ("world", "bf16"), [(1, False), (2, False), (3, False), (1, True), (2, True)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_stage_and_ranks_go_on_as_if_never_stopped(
    gang: Gangs, sources: Sources, stage: int, world: int, bf16: bool
) -> None:
    straight = sources(stage, world, bf16)
    answers = gang(world).run(resumed, stage, bf16, *whole_at(straight, 0))
    assert same_bits(whole_at(answers, 1)[0], whole_at(straight, 1)[0])
    assert same_weights(answers[0][1].weights, straight[0][1].weights)
    assert answers[0][1].norms == straight[0][1].norms
