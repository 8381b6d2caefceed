"""A step's gradient, and the weights it leads to, are those of plain torch on unpacked samples, however it is cut."""

from __future__ import annotations

import pytest

from tests.gang import Gangs
from tests.trainer.exact_cases import (
    CAPACITIES,
    CLIPPED,
    LENGTHS,
    WITH_EXPERTS,
    Case,
    Compared,
    Share,
    all_cases,
    bf16_sums,
    error,
    gradients,
    parameters,
)

BOUND = 1e-6
STAGES = [1, 2, 3]
WORLDS = [1, 2, 3, 4]


def shares(of_all_ranks: tuple[Compared, ...]) -> list[Share]:
    return [one.share for one in of_all_ranks]


def worst(answers: list[list[Compared]]) -> float:
    """Of the errors of every case's gradient and norm; `answers` by rank and case."""
    errors = []
    for of_all_ranks in zip(*answers, strict=True):
        whole = of_all_ranks[0].whole
        assert whole > CLIPPED**2, "clipping must be active where it is on"
        errors += [error(shares(of_all_ranks), whole), *(share.norm_error for share in shares(of_all_ranks))]
    return max(errors)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_of_a_step_is_that_of_its_samples_one_by_one(gang: Gangs, stage: int, world: int) -> None:
    answers = gang(world).run(gradients, stage, "llama", all_cases())
    assert worst(answers) < BOUND
    of_cases = [shares(of_all_ranks) for of_all_ranks in zip(*answers, strict=True)]
    counts = [{share.micro_batches for share in of_case} for of_case in of_cases]
    assert max(max(of_case) for of_case in counts) > 2
    # The steps must be what they are for: uneven where that is allowed, with ranks that have nothing to do.
    assert any(len(of_case) > 1 for of_case in counts) == (stage == 1 and world > 1)
    assert any(share.dummies for of_case in of_cases for share in of_case) == (world > 1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_after_several_steps_are_those_of_plain_torch(gang: Gangs, stage: int, world: int) -> None:
    """Packed and padded take turns: each step goes on from the weights that the other made."""
    cases = [Case(step, index % 2 == 1, CAPACITIES[0], CLIPPED) for index, step in enumerate(LENGTHS)]
    answers = gang(world).run(parameters, stage, "llama", cases)
    assert error([answer.share for answer in answers], answers[0].whole) < BOUND


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_are_summed_in_fp32_over_micro_batches_and_ranks(gang: Gangs, stage: int, world: int) -> None:
    """test_engine shows the error of a configuration that does not ask for it."""
    for padded in (False, True):
        answers = gang(world).run(bf16_sums, stage, Case("uneven", padded, CAPACITIES[0]))
        assert error([answer.share for answer in answers], answers[0].whole) < BOUND


@pytest.mark.parametrize(
    ("world", "stage", "checkpointing"), [(1, 1, True), (2, 1, False), (3, 2, True), (2, 3, True), (4, 3, False)]
)
@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_experts_are_balanced_as_by_transformers_over_the_whole_step(
    gang: Gangs, architecture: str, world: int, stage: int, checkpointing: bool
) -> None:
    cases = [Case(step, padded, CAPACITIES[0]) for step in LENGTHS for padded in (False, True)]
    assert worst(gang(world).run(gradients, stage, architecture, cases, checkpointing)) < BOUND
