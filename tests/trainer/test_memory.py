"""The arithmetic of memory: against numbers worked out by hand, and the order of the ZeRO stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_api.run import ExitCode, RunError
from sft_trainer.job import choose_stage
from sft_trainer.memory import Footprint, MemoryNeed, activation_bytes, advice, memory_need, what_would_fit
from sft_trainer.model import ModelNumbers
from tests.gang import Gangs
from tests.trainer.runs import MORE_THAN_THERE_IS, Runs, Script, make_base, make_run

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


def footprint(ranks: int, gigabytes: int, tokens: int = 32_768, checkpointing: bool = True) -> Footprint:
    return Footprint(EIGHT_B, ranks, tokens, 4096, True, checkpointing, gigabytes * 10**9)


STAGE = "spec.trainer.zeroStage"
TOKENS = "spec.batch.maxTokensPerGPU"
SHORT = {
    "a higher stage": (footprint(8, 80), 1, f"{STAGE} 2, or {TOKENS} 16384 with {STAGE} 2, or 16 ranks with {STAGE} 2"),
    "smaller micro-batches": (footprint(8, 48), 3, f"{TOKENS} 16384 with {STAGE} 3, or 16 ranks with {STAGE} 3"),
    "activation checkpointing": (
        footprint(8, 80, checkpointing=False),
        None,
        f"spec.trainer.activationCheckpointing true with {STAGE} 2, or {TOKENS} 8192 with {STAGE} 3",
    ),
    "more ranks": (footprint(1, 80), None, f"4 ranks with {STAGE} 3"),
    "all at once": (footprint(8, 16), None, f"32 ranks with {TOKENS} 4096 with {STAGE} 3"),
}


@pytest.mark.parametrize("way", SHORT)
def test_a_lack_of_memory_is_told_with_what_would_fit(way: str) -> None:
    asked, stage, ways = SHORT[way]
    there_is = f"there are {asked.available / 10**9:.1f} GB for each rank"
    assert advice(asked, stage) == f"{there_is}; by arithmetic this would fit: {ways}"


def test_a_model_too_large_for_any_number_of_ranks_is_told_so() -> None:
    words = "there are 2.0 GB for each rank, and nothing up to 1024 ranks would fit: it takes more memory, or a smaller"
    assert advice(footprint(8, 2), None) == f"{words} model"


CRAMPED = [
    (footprint(ranks, gigabytes, tokens, checkpointing), stage)
    for ranks in (1, 2, 8)
    for gigabytes in (24, 80)
    for tokens in (4096, 65_536)
    for checkpointing in (True, False)
    for stage in (None, 1, 2, 3)
]


@pytest.mark.parametrize(("asked", "stage"), CRAMPED)
def test_what_is_said_to_fit_does_and_needs_less_than_what_did_not(asked: Footprint, stage: int | None) -> None:
    ways = what_would_fit(asked, stage)
    assert ways
    for found, other in ways:
        assert found.need.fits(other, found.available)
        assert stage is None or found.need.by_stage[other] < asked.need.by_stage[stage]
        assert found.tokens >= asked.fewest_tokens


def test_a_rank_that_is_refused_memory_in_a_step_says_what_would_fit(gang: Gangs, tmp_path: Path) -> None:
    runs = Runs(gang, make_base(tmp_path), tmp_path)
    ending = runs.run("exhausted", script=Script(exhaust_in=4), changes={"checkpoints": {"every": {"steps": 1}}})
    assert ending.code == ExitCode.OUT_OF_MEMORY
    assert ending.message.startswith("out of memory: ")
    assert f"you tried to allocate {MORE_THAN_THERE_IS} bytes" in ending.message
    assert "; by arithmetic this would fit: " in ending.message
    assert set(runs.told("exhausted").digests) >= {1, 2}
    assert runs.run("exhausted").code == ExitCode.COMPLETED


def test_the_lowest_stage_that_fits_is_taken_unless_one_is_asked_for(tmp_path: Path) -> None:
    base, out = make_base(tmp_path), f"file://{tmp_path}/out"
    unset, second = (make_run(base, out, {"trainer": {"zeroStage": stage}}) for stage in (None, 2))
    assert choose_stage(unset, footprint(8, 80, 16_384)) == 2
    assert choose_stage(second, footprint(8, 2)) == 2
    with pytest.raises(RunError) as caught:
        choose_stage(unset, footprint(8, 16))
    assert caught.value.code == ExitCode.OUT_OF_MEMORY
    words = f"the model needs {footprint(8, 16).need.by_stage[3] / 1e9:.1f} GB on each rank with ZeRO 3: "
    assert str(caught.value) == words + advice(footprint(8, 16), None)
