"""Tensors of a step: labels within their sample, every sample on one rank once, positions that are sought."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from types import FrameType

import numpy as np
import pytest
import torch

from sft_trainer.batches import DUMMY, IGNORED, Step, StepLoader, packed_batch, padded_batch
from sft_trainer.plan import Packer
from sft_trainer.preparation import prepared_job
from sft_trainer.split import PhaseData, open_data
from tests.trainer.exact_cases import MadeData
from tests.trainer.runs import make_base, make_run

CPU = torch.device("cpu")
FIRST = (np.array([5, 6, 7], np.int32), np.array([False, False, True]))
SECOND = (np.array([8, 9], np.int32), np.array([False, True]))


@pytest.fixture(scope="module")
def phase(tmp_path_factory: pytest.TempPathFactory) -> PhaseData:
    folder = make_base(tmp_path_factory.mktemp("base"))
    config = make_run(folder, f"file://{folder}/out")
    return open_data(config, prepared_job(config))[0][0]


def test_packed_samples_lie_side_by_side_and_no_label_crosses_into_the_next() -> None:
    batch = packed_batch([FIRST, SECOND])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 7, IGNORED, 9, IGNORED]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5]
    assert (batch["lengths"], batch["max_length"]) == ([3, 2], 3)
    assert "attention_mask" not in batch


def test_padded_samples_lie_in_rows_and_padding_is_masked() -> None:
    batch = padded_batch([FIRST, SECOND])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 7, IGNORED], [9, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("make", [packed_batch, padded_batch])
def test_a_dummy_has_no_label(make: object) -> None:
    assert set(make([DUMMY])["labels"].flatten().tolist()) == {IGNORED}  # type: ignore[operator]


def steps_of(phase: PhaseData, ranks: int, padded: bool, rank: int, start: tuple[int, int] = (0, 0)) -> list[Step]:
    packer = Packer(ranks, equal_counts=True, padded=padded, quadratic_length=1000.0)
    loader = StepLoader(phase, packer, rank, CPU, seed=42, phase=0)
    steps_per_epoch = -(-len(phase.samples) // phase.effective_batch_size)
    return list(loader.steps(*start, epochs=2, steps_per_epoch=steps_per_epoch))


def samples_in(steps: list[Step]) -> list[tuple[int, ...]]:
    """The token ids of every sample in the micro-batches, dummies left out."""
    found = []
    for step in steps:
        for batch in step.mine:
            if "cu_seq_lens" in batch:
                rows = batch["input_ids"][0].split(batch["lengths"])
            else:
                rows = [
                    row[: int(mask.sum())]
                    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
                ]
            found += [tuple(row.tolist()) for row in rows if row.any()]
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_sample_is_on_one_rank_once_an_epoch(phase: PhaseData, ranks: int, padded: bool) -> None:
    wanted = [tuple(phase.dataset.tokens(int(index))[0].tolist()) for index in phase.samples]
    found = [sample for rank in range(ranks) for sample in samples_in(steps_of(phase, ranks, padded, rank))]
    assert Counter(found) == Counter(wanted * 2)


def test_loss_tokens_of_a_step_are_the_labels_of_all_ranks(phase: PhaseData) -> None:
    per_rank = [steps_of(phase, 2, False, rank) for rank in (0, 1)]
    for steps in zip(*per_rank, strict=True):
        labels = sum(int((batch["labels"] != IGNORED).sum()) for step in steps for batch in step.mine)
        assert labels == steps[0].num_loss_tokens == steps[1].num_loss_tokens


def test_a_position_is_sought_and_not_walked_to(phase: PhaseData) -> None:
    whole = steps_of(phase, 2, False, 1)
    rest = steps_of(phase, 2, False, 1, start=(1, 1))
    assert [step.digest for step in rest] == [step.digest for step in whole[-len(rest) :]]
    assert samples_in(rest) == samples_in(whole[-len(rest) :])
    assert len(rest) == len(whole) // 2 - 1


def calls_until_the_first_step(loader: StepLoader, position: tuple[int, int], steps: tuple[int, int]) -> Counter[str]:
    """How often each function of the trainer is called, in any thread, before the step at `position` is handed out."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_globals["__name__"].startswith("sft_trainer"):
            calls[frame.f_code.co_qualname] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        iterator = loader.steps(*position, *steps)
        step = next(iterator)
        iterator.close()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert step.epoch == position[0]
    return calls


def test_what_a_resumed_run_reads_and_does_does_not_grow_with_the_position() -> None:
    epochs, size = 1000, 4
    data = MadeData([FIRST] * (10 * size))
    phase = PhaseData(data, np.arange(len(data)), size, 8)
    work = []
    for position in [(0, 0), (0, 8), (epochs - 1, 0), (epochs - 1, 8)]:
        data.read.clear()
        loader = StepLoader(phase, Packer(1, False, False, 1000.0), 0, CPU, seed=42, phase=0)
        work.append((calls_until_the_first_step(loader, position, (epochs, 10)), len(data.read)))
    assert work == [work[0]] * len(work)
    calls, reads = work[0]
    assert calls["permutation"] == 1
    assert reads == 2 * size  # the step and the one that is prepared meanwhile


def test_another_epoch_has_another_order(phase: PhaseData) -> None:
    steps = steps_of(phase, 1, False, 0)
    half = len(steps) // 2
    assert [step.digest for step in steps[:half]] != [step.digest for step in steps[half:]]
    assert sum(step.num_samples for step in steps[:half]) == len(phase.samples)
