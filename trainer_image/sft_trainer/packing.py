"""Placing samples in bins: the arithmetic of sft_trainer.plan, on integers throughout.

Exact sums and ties broken by number: neither the order of a sum nor the processor can change a plan. The loops run
over rounds of as many samples as there are bins, so that numpy has work to do in each.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_FEW_BINS = 12
"""With fewer bins than this a round is too short to pay for numpy's calls: one sample at a time is quicker."""
_WORTH_A_MICRO_BATCH = 0.995
"""One more micro-batch has a price that costs do not tell (launches, gathers): it must save half a percent."""
_GOOD_ENOUGH = 0.9
"""Share of the bound from which on no further number of micro-batches is tried."""


@dataclass(frozen=True)
class Samples:
    """A step's samples, longest first, and what they are to be spread over."""

    order: Ints
    """Their positions in the step; equal lengths by position."""
    lengths: Ints
    costs: Ints
    """In units of 1/`unit` tokens, rounded: whole numbers that leave bits for the number of a bin beside their sums."""
    unit: float
    total: int
    ranks: int
    capacity: int

    @classmethod
    def of(cls, order: Ints, lengths: Ints, costs: NDArray[np.float64], ranks: int, capacity: int) -> Samples:
        spare_bits = 60 - num_bits(len(lengths) + ranks) - int(np.frexp(costs[0] * len(lengths))[1])
        unit = 2.0 ** min(spare_bits, 16)
        whole = np.maximum(np.rint(costs * unit), 1).astype(np.int64)
        return cls(order, lengths, whole, unit, int(whole.sum()), ranks, capacity)


@dataclass(frozen=True)
class Assignment:
    """The i-th longest sample is in micro-batch slots[i] of ranks[i]; the step then takes `span`."""

    ranks: Ints
    slots: Ints
    span: int


def one_barrier(samples: Samples) -> Assignment:
    """Longest first onto the least loaded rank by cost, then best fit by tokens into micro-batches."""
    ranks = least_loaded(samples.costs, samples.ranks)
    slots = best_fit(samples.lengths, ranks, samples.ranks, samples.capacity)
    return Assignment(ranks, slots, int(_sums(ranks, samples.costs, samples.ranks).max()))


def equal_counts(samples: Samples) -> Assignment:
    """count × ranks bins, with the smallest count that holds the samples, or one more where that is much better."""
    count = _fewest(samples)
    bins = _fill_to_levels(samples, count)
    if bins is None:
        return _tight_counts(samples, count)
    best = _deal(samples, bins, count, samples.costs)
    if max(samples.total, int(samples.costs[0]) * samples.ranks) < _GOOD_ENOUGH * best.span * samples.ranks:
        more = _fill_to_levels(samples, count + 1)
        if more is not None:
            best = _cheaper(best, _deal(samples, more, count + 1, samples.costs))
    return best


def padded(samples: Samples) -> Assignment:
    """Runs of like length, none dearer than one level: the lowest level that needs no more micro-batches."""
    fitting = samples.capacity // samples.lengths
    count = -(-len(_runs(fitting)) // samples.ranks)
    low, high = 0, int((fitting * samples.costs).max())
    while high - low > high // 512 + 1:
        middle = (low + high) // 2
        if len(_runs(np.clip(middle // samples.costs, 1, fitting))) <= count * samples.ranks:
            high = middle
        else:
            low = middle
    starts = _runs(np.clip(high // samples.costs, 1, fitting))
    sizes = np.diff([*starts, len(samples.costs)])
    return _deal(samples, np.repeat(np.arange(len(starts)), sizes), count, np.repeat(samples.costs[starts], sizes))


def least_loaded(costs: Ints, num_bins: int) -> Ints:
    """For each of the costs (descending) the bin that is the least loaded so far, the first of equal ones.

    In rounds rather than one by one, with the same result: waiting bins may be served in order as long as none that
    was served falls below one that waits. A load carries the number of its bin in its low bits.
    """
    if num_bins < _FEW_BINS:
        return _least_loaded_one_by_one(costs, num_bins)
    steps, bins = costs << num_bits(num_bins), np.empty_like(costs)
    loads = np.arange(num_bins)
    done = 0
    while done < len(costs):
        loads.sort()
        size = min(num_bins, len(costs) - done)
        limit = loads[0] + steps[done + size - 1]
        if loads[size - 1] > limit:
            size = int(loads.searchsorted(limit, "right"))
        bins[done : done + size] = loads[:size]
        loads[:size] += steps[done : done + size]
        done += size
    return bins & low_bits(num_bins)


def _least_loaded_one_by_one(costs: Ints, num_bins: int) -> Ints:
    if num_bins == 1:
        return np.zeros_like(costs)
    loads, bins = list(range(num_bins)), []
    for step in (costs << num_bits(num_bins)).tolist():
        bins.append(loads[0])
        heapq.heapreplace(loads, loads[0] + step)
    return np.array(bins) & low_bits(num_bins)


def best_fit(lengths: Ints, ranks: Ints, num_ranks: int, capacity: int) -> Ints:
    """For each sample (longest first) the fullest bin of its rank that has room, or a new bin."""
    if num_ranks >= _FEW_BINS:
        return _best_fit_in_rounds(lengths, ranks, num_ranks, capacity)
    slots = np.empty_like(lengths)
    for rank in range(num_ranks):
        mine = np.flatnonzero(ranks == rank)
        slots[mine] = _best_fit_one_by_one(lengths[mine], capacity)
    return slots


def _best_fit_one_by_one(lengths: Ints, capacity: int) -> Ints:
    shift, mask = num_bits(len(lengths)), low_bits(len(lengths))
    rooms: list[int] = []  # what is left in each bin, with the number of the bin in its low bits; ascending
    bins = []
    for length in lengths.tolist():
        first = bisect_left(rooms, length << shift)
        room = rooms.pop(first) if first < len(rooms) else capacity << shift | len(rooms)
        bins.append(room & mask)
        insort(rooms, room - (length << shift))
    return np.array(bins, np.int64)


def _best_fit_in_rounds(lengths: Ints, ranks: Ints, num_ranks: int, capacity: int) -> Ints:
    """Best fit on all ranks at once: round j places the j-th longest sample of every rank."""
    by_rank = argsort(ranks)
    owners = ranks[by_rank]
    counts = np.bincount(ranks, minlength=num_ranks)
    turns = np.arange(len(lengths)) - (np.cumsum(counts) - counts)[owners]
    table = np.zeros((int(counts.max()), num_ranks), np.int32)
    table[turns, owners] = lengths[by_rank]
    num_bins = -(-int(table.sum(axis=0, dtype=np.int64).max()) // capacity) + 1
    while (placed := _best_fit_table(table, num_bins, capacity)) is None:
        num_bins += 1 + num_bins // 8
    slots = np.empty_like(lengths)
    slots[by_rank] = placed[turns, owners]
    return slots


def _best_fit_table(table: NDArray[np.int32], num_bins: int, capacity: int) -> NDArray[np.int32] | None:
    """Bins for the lengths [round, rank], of which zeros are no samples; None where a rank has too few bins."""
    num_ranks = table.shape[1]
    room = np.full((num_ranks, num_bins), capacity, np.int32)
    left = np.empty_like(room)
    left_or_huge = left.view(np.uint32)  # where a sample does not fit, what is left is negative: never the minimum
    flat, first = room.reshape(-1), np.arange(num_ranks) * num_bins
    placed = np.empty_like(table)
    for lengths, bins in zip(table, placed, strict=True):
        np.subtract(room, lengths[:, None], out=left)
        best = left_or_huge.argmin(axis=1)
        bins[:] = best
        best += first
        flat[best] -= lengths
    return None if room.min() < 0 else placed


def _fewest(samples: Samples) -> int:
    """No fewer micro-batches on each rank can hold the samples: by their tokens, and two halves and more fit no bin."""
    by_tokens = -(-int(samples.lengths.sum()) // samples.capacity)
    by_size = int(np.count_nonzero(2 * samples.lengths > samples.capacity))
    return -(-max(by_tokens, by_size) // samples.ranks)


def _tight_counts(samples: Samples, count: int) -> Assignment:
    """Where levels do not fit in `count`: best fit says how many surely suffice; levels may do better up to there."""
    bins = _best_fit_one_by_one(samples.lengths, samples.capacity)
    enough = -(-(int(bins.max()) + 1) // samples.ranks)
    best = _deal(samples, bins, enough, samples.costs)
    for more in range(count + 1, enough + 2):
        levelled = _fill_to_levels(samples, more)
        if levelled is not None:
            return _cheaper(best, _deal(samples, levelled, more, samples.costs))
    return best


def _cheaper(fewer: Assignment, more: Assignment) -> Assignment:
    return more if more.span < _WORTH_A_MICRO_BATCH * fewer.span else fewer


def _fill_to_levels(samples: Samples, count: int) -> Ints | None:
    """Longest first into count × ranks bins, each time the one furthest below its level; None if they do not fit.

    As least_loaded, but that a bin starts at the distance of its level from the highest, and that one without room
    for the longest sample left waits until they are shorter.
    """
    num_bins, num_samples = count * samples.ranks, len(samples.lengths)
    levels, mask = _levels(samples, count), low_bits(num_bins)
    loads = (np.repeat(levels.max() - levels, samples.ranks) << num_bits(num_bins)) | np.arange(num_bins)
    steps, bins = samples.costs << num_bits(num_bins), np.empty_like(samples.costs)
    room = np.full(num_bins, samples.capacity)
    done = 0
    while done < num_samples:
        loads.sort()
        fitting = np.flatnonzero(room[loads & mask] >= samples.lengths[done])[: num_samples - done]
        if not len(fitting):
            return None
        waiting = loads[fitting]
        size = int(waiting.searchsorted(waiting[0] + steps[done + len(fitting) - 1], "right"))
        now, served = slice(done, done + size), waiting[:size] & mask
        loads[fitting[:size]] += steps[now]
        room[served] -= samples.lengths[now]
        bins[now] = served
        done += size
    return bins


def _levels(samples: Samples, count: int) -> Ints:
    """To what cost the bins of each of `count` micro-batches should be filled, dearest first.

    With long samples in company the k-th micro-batch costs at least its longest, the (k · ranks)-th of all; the other
    levels are equal. A bin with a long sample cannot reach a dear level with short ones, for its tokens run out
    (attention is what made it dear): what it lacks, the others must take.
    """
    num_bins = count * samples.ranks
    num_heads = min(num_bins, len(samples.costs))
    costs, lengths = np.zeros(num_bins, np.int64), np.zeros(num_bins, np.int64)
    costs[:num_heads], lengths[:num_heads] = samples.costs[:num_heads], samples.lengths[:num_heads]
    least, low = costs[:: samples.ranks], -(-samples.total // num_bins)
    if least[0] <= low:
        return np.full(count, low)
    rest = slice(num_heads if num_heads < len(samples.costs) else -1, None)
    density = float(samples.costs[rest].sum() / samples.lengths[rest].sum())
    reach = (costs + ((samples.capacity - lengths) * density).astype(np.int64)).reshape(count, samples.ranks)
    high, exact = max(int(least[0]), 2 * low), low // 512 + 1
    while high - low > exact:
        middle = (low + high) // 2
        if np.minimum(np.maximum(least, middle)[:, None], reach).sum() < samples.total:
            low = middle
        else:
            high = middle
    return np.maximum(least, high)


def _deal(samples: Samples, bins: Ints, count: int, costs: Ints) -> Assignment:
    """Micro-batch k is the k-th dearest group of bins, for no other grouping has a smaller Σ max.

    Groups are dealt to and fro, so that the ranks come out even too.
    """
    loads = _sums(bins, costs, count * samples.ranks)
    by_load = argsort(loads.max() - loads)
    turn = np.empty_like(by_load)
    turn[by_load] = np.arange(len(by_load))
    slots, ranks = np.divmod(turn, samples.ranks)
    ranks = np.where(slots % 2 == 0, ranks, samples.ranks - 1 - ranks)
    return Assignment(ranks[bins], slots[bins], int(loads[by_load[:: samples.ranks]].sum()))


def _runs(sizes: Ints) -> list[int]:
    """Where runs start, when one that starts at i has sizes[i] members."""
    following, starts, start = (np.arange(len(sizes)) + sizes).tolist(), [], 0
    while start < len(following):
        starts.append(start)
        start = following[start]
    return starts


def _sums(bins: Ints, values: Ints, num_bins: int) -> Ints:
    """Σ values by bin, exactly, as bincount's weights are not."""
    sums = np.zeros(num_bins, np.int64)
    np.add.at(sums, bins, values)
    return sums


def argsort(values: Ints) -> Ints:
    """A stable argsort of numbers of 0 and more, by way of unique keys: numpy sorts far faster than it argsorts."""
    keys = (values << num_bits(len(values))) | np.arange(len(values))
    keys.sort()
    keys &= low_bits(len(values))
    return keys


def num_bits(count: int) -> int:
    """Bits that tell `count` numbers apart."""
    return (count - 1).bit_length()


def low_bits(count: int) -> int:
    return (1 << num_bits(count)) - 1
