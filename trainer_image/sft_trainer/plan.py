"""Who computes what in an optimizer step, from lengths alone: pure, the same on every rank without communication.

A step's samples go to ranks and, on each rank, to micro-batches of at most `capacity` tokens. A packed sample costs
l + l²/L0 (sample_cost); empty capacity costs nothing.

    one barrier a step (ZeRO 1)           the step takes max over ranks of Σ cost
    a barrier a micro-batch (ZeRO 2, 3)   the step takes Σ over micro-batches k of max over ranks of cost(k, rank)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_api.run import ExitCode, RunError
from sft_trainer import packing
from sft_trainer.packing import Assignment, Ints, Samples

MicroBatches = list[list[Ints]]


@dataclass(frozen=True)
class StepPlan:
    """One step's samples, spread over ranks and micro-batches."""

    micro_batches: MicroBatches
    """[rank][k]: positions in the step's sample array. An empty array is a dummy; every rank has one at least."""
    cost: float
    """Σ sample_cost over the step, in tokens."""
    span: float
    """What the step takes under the barriers that it was planned for, in tokens of sample_cost."""
    lower_bound: float
    """No plan has a span below this: max(cost / ranks, the dearest sample)."""

    @property
    def efficiency(self) -> float:
        """Cost utilisation: the share of the ranks' time that is spent on samples."""
        return self.cost / (len(self.micro_batches) * self.span)

    @property
    def bound(self) -> float:
        """The best possible efficiency: below 1 where the batch is too small for so many ranks."""
        return self.cost / (len(self.micro_batches) * self.lower_bound)

    @property
    def max_micro_batches(self) -> int:
        return max(len(mine) for mine in self.micro_batches)


def permutation(num_samples: int, seed: int, phase: int, epoch: int) -> Ints:
    """The order of an epoch's samples: a pure function of its arguments.

    Sorts the raw words of a Philox stream that has the arguments as its key: numpy keeps that stream for ever, which
    it does not promise of `Generator.permutation`.
    """
    words = np.random.Philox(key=seed | phase << 64 | epoch << 96).random_raw(num_samples)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def samples_digest(content: NDArray[np.uint64]) -> str:
    """A digest (32 hex digits) of the multiset of samples with these content hashes, whatever their order."""
    return hashlib.blake2b(np.sort(content).astype("<u8").tobytes(), digest_size=16).hexdigest()


def sample_cost(lengths: NDArray[np.integer], quadratic_length: float) -> NDArray[np.float64]:
    """What packed samples cost to compute, in tokens: l + l²/L0.

    `quadratic_length` is L0 = parameters / (layers · heads · head_dim): the sample length at which attention costs as
    much as all the rest, for forward and backward of a causal sample are 6·N·l + 6·layers·width·l² FLOPs.
    """
    tokens = lengths.astype(np.float64)
    return tokens + tokens * tokens / quadratic_length


def check_capacity(lengths: NDArray[np.integer], capacity: int, path: str = "spec.batch.maxTokensPerGPU") -> None:
    """RunError where a sample is longer than a micro-batch may be."""
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        num_longer = int(np.count_nonzero(lengths > capacity))
        raise RunError(
            ExitCode.CONFIGURATION,
            f"{capacity:,} tokens cannot hold the longest sample, of {longest:,} tokens (too long: {num_longer:,} of "
            f"{len(lengths):,}). Allow at least {longest:,}, or lower maxSequenceLength to {capacity:,}",
            path=path,
        )


def pack(
    lengths: NDArray[np.integer], ranks: int, capacity: int, quadratic_length: float, equal_counts: bool
) -> StepPlan:
    """Plan a step of packed samples: each of `lengths` (in tokens) is in the plan once.

    With `equal_counts` every rank has the same number of micro-batches (ZeRO 2, 3). RunError where a sample is longer
    than the capacity.
    """
    samples = _longest_first(lengths, ranks, capacity, quadratic_length)
    # A single rank waits for nobody, so that nothing is to be balanced.
    place = packing.equal_counts if equal_counts and ranks > 1 else packing.one_barrier
    return _plan(samples, place(samples), dummies=equal_counts)


def pack_padded(lengths: NDArray[np.integer], ranks: int, capacity: int, quadratic_length: float) -> StepPlan:
    """Plan a step of padded micro-batches, each of samples of like length, as many on every rank.

    Capacity bounds longest × count. Every sample of a micro-batch costs what its longest does: padding shows as lost
    efficiency. RunError where a sample is longer than the capacity.
    """
    samples = _longest_first(lengths, ranks, capacity, quadratic_length)
    return _plan(samples, packing.padded(samples), dummies=True)


@dataclass(frozen=True)
class Packer:
    """How steps are spread over ranks and micro-batches.

    Args:
        ranks: world size.
        equal_counts: whether every rank must run the same number of micro-batches (ZeRO 2 and 3).
        padded: whether samples lie in rows of equal length instead of side by side.
        quadratic_length: L0 of `cost(l) = l + l²/L0`, in tokens.
    """

    ranks: int
    equal_counts: bool
    padded: bool
    quadratic_length: float

    def plan(self, lengths: NDArray[np.integer], capacity: int) -> StepPlan:
        """Plan one step; `capacity` bounds a micro-batch in tokens."""
        if self.padded:
            return pack_padded(lengths, self.ranks, capacity, self.quadratic_length)
        return pack(lengths, self.ranks, capacity, self.quadratic_length, self.equal_counts)


def _longest_first(lengths: NDArray[np.integer], ranks: int, capacity: int, quadratic_length: float) -> Samples:
    assert ranks >= 1
    assert len(lengths) > 0
    check_capacity(lengths, capacity)
    whole = lengths.astype(np.int64)
    assert whole.min() > 0
    order = packing.argsort(capacity - whole)
    return Samples.of(order, whole[order], sample_cost(whole[order], quadratic_length), ranks, capacity)


def _plan(samples: Samples, placed: Assignment, dummies: bool) -> StepPlan:
    """Positions by rank and micro-batch; in a micro-batch they ascend."""
    width = int(placed.slots.max()) + 1
    labels = placed.ranks * width + placed.slots
    by_label = np.empty_like(labels)
    by_label[samples.order] = labels
    positions = packing.argsort(by_label)
    ends = np.cumsum(np.bincount(labels, minlength=samples.ranks * width)).tolist()
    pieces = [positions[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    rows = [pieces[start : start + width] for start in range(0, len(pieces), width)]
    if not dummies:
        rows = [[piece for piece in row if len(piece)] or row[:1] for row in rows]
    unit, dearest = samples.unit, float(samples.costs[0])
    lower_bound = max(samples.total / samples.ranks, dearest) / unit
    return StepPlan(rows, cost=samples.total / unit, span=placed.span / unit, lower_bound=lower_bound)
