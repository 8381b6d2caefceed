"""Each state that an API server, a training operator or a kubelet can show, and the decision that it gets."""

from __future__ import annotations

import pytest

from sft_operator.reconcile import reconcile
from tests.operator.builders import NOW, SETTINGS
from tests.operator.simulator import World
from tests.operator.states import ending, placing, preparing, stopping
from tests.operator.states.case import Case, named, spelled

CASES = (*preparing.CASES, *placing.CASES, *ending.CASES, *stopping.CASES)
TABLE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@TABLE
def test_each_state_gets_its_decision(case: Case) -> None:
    case.check(reconcile(case.job, case.observed, SETTINGS, NOW))


@TABLE
def test_a_decision_carried_out_twice_is_the_same_as_once(case: Case) -> None:
    world = World(case.job, case.observed, NOW)
    last = [world.look() for _ in range(case.steps)][-1]
    again = world.look()
    assert again.status == last.status
    assert set(map(named, again.apply)) <= set(map(named, last.apply))
    assert set(map(spelled, again.delete)) <= set(map(spelled, last.delete))


@TABLE
@pytest.mark.parametrize("stages", [0, 1, 2], ids=["before anything", "after apply", "after the status"])
def test_an_operator_that_dies_in_between_is_made_good_by_the_next(case: Case, stages: int) -> None:
    whole, broken = World(case.job, case.observed, NOW), World(case.job, case.observed, NOW)
    broken.look(stages)
    for world in (whole, broken):
        for _ in range(case.steps):
            world.look()
    assert broken.status == whole.status
    assert broken.observed == whole.observed
