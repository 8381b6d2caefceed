"""The arithmetic of memory: against numbers worked out by hand, and the order of the ZeRO stages."""

from __future__ import annotations

import pytest

from sft_trainer.memory import MemoryNeed, activation_bytes, memory_need
from sft_trainer.model import ModelNumbers

EIGHT_B = ModelNumbers(
    parameters=8_030_000_000,
    matrix_parameters=7_500_000_000,
    layers=32,
    width=4096,
    hidden=4096,
    vocabulary=128_256,
    quadratic_length=57_220.0,
)


def states(ranks: int, bf16: bool) -> dict[int, float]:
    """Bytes a parameter, without activations, with so many parameters that nothing else counts."""
    numbers = ModelNumbers(
        parameters=10**12, matrix_parameters=10**12, layers=10**9, width=1, hidden=1, vocabulary=1, quadratic_length=1.0
    )
    need = memory_need(numbers, ranks, micro_batch_tokens=1, bf16=bf16, checkpointing=True)
    activations = activation_bytes(numbers, 1, 2 if bf16 else 4, checkpointing=True)
    return {stage: round((total - activations) / 10**12, 3) for stage, total in need.by_stage.items()}


def test_bf16_costs_weights_gradients_and_fp32_sums_then_masters_and_moments_shared_by_stage() -> None:
    # 2 weight + 2 gradient + 4 sum, 12 master and moments; stage 1 shares the last, 2 also the sum, 3 everything.
    assert states(8, bf16=True) == {1: 8 + 12 / 8, 2: 4 + 16 / 8, 3: 20 / 8}


def test_fp32_needs_no_sum_beside_the_gradient() -> None:
    assert states(4, bf16=False) == {1: 8 + 12 / 4, 2: 8 + 12 / 4, 3: 20 / 4}


def test_one_rank_has_nothing_to_share() -> None:
    assert len(set(states(1, bf16=True).values())) == 1


@pytest.mark.parametrize(("gigabytes", "stage"), [(192, 1), (100, 1), (80, 2), (48, 3), (24, None)])
def test_an_8b_model_on_eight_gpus_takes_the_lowest_stage_that_fits(gigabytes: int, stage: int | None) -> None:
    need = memory_need(EIGHT_B, ranks=8, micro_batch_tokens=16_384, bf16=True, checkpointing=True)
    assert need.lowest_that_fits(gigabytes * 10**9) == stage


def test_checkpointing_keeps_a_layer_s_input_instead_of_all_it_computes() -> None:
    kept = activation_bytes(EIGHT_B, 32_768, 2, checkpointing=True)
    all_of_it = activation_bytes(EIGHT_B, 32_768, 2, checkpointing=False)
    assert kept < all_of_it / 10


def test_a_reserve_is_left_alone() -> None:
    need = MemoryNeed({1: 85, 2: 50, 3: 20})
    assert need.fits(1, 100)
    assert not need.fits(1, 99)
