"""The gang is itself a tool of tests: what it promises when a case fails is shown here."""

import os
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.gang import GangFailure, Gangs


def rank_sum() -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return os.getpid(), float(total)


def fail_on_rank_1() -> None:
    print("words of rank", dist.get_rank())
    if dist.get_rank() == 1:
        raise ValueError("what went wrong")
    dist.barrier()


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        threading.Event().wait()


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(3)


def test_ranks_stay_alive_between_cases(gang: Gangs) -> None:
    first, second = gang(2).run(rank_sum), gang(2).run(rank_sum)
    assert first == second
    assert [total for _, total in first] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        pytest.param(fail_on_rank_1, ["rank 1", "ValueError: what went wrong", "words of rank 1"], id="raises"),
        pytest.param(hang_on_rank_0, ["rank 0: no answer in time", "hang_on_rank_0"], id="hangs"),
        pytest.param(die_on_rank_0, ["rank 0: the process ended without an answer"], id="dies"),
    ],
)
def test_a_failed_case_is_told_with_its_rank_and_the_next_gets_a_fresh_gang(
    gang: Gangs, case: Callable[[], None], words: list[str]
) -> None:
    before = gang(2).run(rank_sum)
    with pytest.raises(GangFailure) as failure:
        gang(2).run(case, seconds=2.0)
    assert all(word in str(failure.value) for word in words), str(failure.value)
    after = gang(2).run(rank_sum)
    assert {pid for pid, _ in before}.isdisjoint(pid for pid, _ in after)
    assert [total for _, total in after] == [3.0, 3.0]
