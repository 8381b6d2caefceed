"""Who computes what in one optimizer step, from lengths alone: pure numpy, the same on every rank, no communication.

A step's samples go to ranks and, on each rank, to micro-batches of at most `capacity` tokens. What a packed sample costs
is `l + l²/L0` (sample_cost); empty capacity costs nothing. Everything is decided on integers with ties broken by
position, so that neither the order of a sum nor the processor can change a plan.

    one barrier a step (ZeRO 1)            time of the step = max over ranks of Σ cost
    a barrier a micro-batch (ZeRO 2, 3)    time of the step = Σ over micro-batches k of max over ranks of cost(k, rank)
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sft_api.run import ExitCode, RunError

Ints = NDArray[np.int64]
MicroBatches = list[list[Ints]]

_FEW_RANKS = 12
"""Below this many ranks best-fit is quicker sample by sample than in rounds over all ranks."""
_WORTH_A_MICRO_BATCH = 0.995
"""One more micro-batch has a price that `cost` does not know (launches, gathers): it must save half a percent."""
_GOOD_ENOUGH = 0.9
"""Share of the bound above which no further number of micro-batches is tried."""


@dataclass(frozen=True)
class StepPlan:
    """One step's samples, spread over ranks and micro-batches."""

    micro_batches: MicroBatches
    """[rank][k]: positions in the step's sample array; an empty array is a dummy micro-batch. Every rank has one at least."""
    cost: float
    """Σ sample_cost over the step, in tokens."""
    span: float
    """The cost of the step's critical path under the barriers that it was planned for, in tokens."""
    lower_bound: float
    """No plan has a span below this: max(cost / ranks, the dearest sample)."""

    @property
    def efficiency(self) -> float:
        """Cost utilisation: the share of rank-time that is spent on samples."""
        return self.cost / (len(self.micro_batches) * self.span)

    @property
    def bound(self) -> float:
        """The best possible efficiency; below 1 where the batch is too small for the ranks."""
        return self.cost / (len(self.micro_batches) * self.lower_bound)

    @property
    def max_micro_batches(self) -> int:
        return max(len(mine) for mine in self.micro_batches)


def permutation(num_samples: int, seed: int, phase: int, epoch: int) -> Ints:
    """The order of an epoch's samples: a pure function of its arguments.

    Sorts the raw words of a Philox stream with the arguments as its key: numpy promises that stream for ever, and
    does not promise `Generator.permutation`.
    """
    words = np.random.Philox(key=seed | phase << 64 | epoch << 96).random_raw(num_samples)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def samples_digest(content: NDArray[np.uint64]) -> str:
    """A digest (32 hex digits) of the multiset of samples with these content hashes, whatever their order."""
    return hashlib.blake2b(np.sort(content).astype("<u8").tobytes(), digest_size=16).hexdigest()


def sample_cost(lengths: NDArray[np.integer], quadratic_length: float) -> NDArray[np.float64]:
    """What packed samples cost to compute, in tokens: l + l²/L0.

    L0 = parameters / (layers · heads · head_dim) is where attention costs as much as everything else: the forward and
    backward of a causal sample are 6·N·l + 6·layers·width·l² FLOPs.
    """
    tokens = lengths.astype(np.float64)
    return tokens + tokens * tokens / quadratic_length


def check_capacity(lengths: NDArray[np.integer], capacity: int, path: str = "spec.batch.maxTokensPerGPU") -> None:
    """Refuse samples that no micro-batch can hold."""
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        too_long = int(np.count_nonzero(lengths > capacity))
        raise RunError(
            ExitCode.CONFIGURATION,
            f"{capacity:,} tokens is less than the longest sample, which has {longest:,} ({too_long:,} samples are "
            f"longer than the capacity). Allow at least {longest:,}, or lower maxSequenceLength to {capacity:,}",
            path=path,
        )


def pack(
    lengths: NDArray[np.integer], ranks: int, capacity: int, quadratic_length: float, equal_counts: bool
) -> StepPlan:
    """Plan a step of packed samples.

    `lengths` are the step's samples in tokens, all of them in the plan once. With `equal_counts` every rank has the
    same number of micro-batches (ZeRO 2, 3). RunError where a sample exceeds the capacity.
    """
    step = _Step.of(lengths, ranks, capacity, quadratic_length)
    return _pack_equal_counts(step) if equal_counts else _pack_one_barrier(step)


def pack_padded(lengths: NDArray[np.integer], ranks: int, capacity: int, quadratic_length: float) -> StepPlan:
    """Plan a step of padded micro-batches: each holds samples of like length, and every rank has the same number.

    Capacity bounds longest × count, and every sample of a micro-batch costs what its longest does, so efficiency
    counts padding as waste. RunError where a sample exceeds the capacity.
    """
    return _pack_padded(_Step.of(lengths, ranks, capacity, quadratic_length))


@dataclass(frozen=True)
class _Step:
    """The step's samples, longest first, with costs as integers."""

    order: Ints
    """Positions in the step, longest first, equal ones by position."""
    lengths: Ints
    costs: Ints
    """sample_cost × `unit`, rounded: sums of them are exact, and leave room for a bin's number beside them."""
    unit: float
    total: int
    ranks: int
    capacity: int

    @classmethod
    def of(cls, lengths: NDArray[np.integer], ranks: int, capacity: int, quadratic_length: float) -> _Step:
        assert ranks >= 1
        assert len(lengths) > 0
        check_capacity(lengths, capacity)
        lengths = lengths.astype(np.int64)
        assert lengths.min() > 0
        keys = _with_index(capacity - lengths)
        keys.sort()
        order = keys & _mask(len(lengths))
        ordered = lengths[order]
        costs = sample_cost(ordered, quadratic_length)
        spare = 60 - _bits(len(lengths) + ranks) - int(np.frexp(costs[0] * len(lengths))[1])
        unit = 2.0 ** min(spare, 16)
        whole = np.rint(costs * unit).astype(np.int64)
        return cls(order, ordered, whole, unit, int(whole.sum()), ranks, capacity)

    def plan(self, ranks: Ints, slots: Ints, span: int, equal_counts: bool) -> StepPlan:
        """The plan in which the i-th longest sample is in micro-batch slots[i] of ranks[i]."""
        lower_bound = max(self.total / self.ranks, float(self.costs[0]))
        return StepPlan(
            micro_batches=_collect(self.order, ranks, slots, self.ranks, equal_counts),
            cost=self.total / self.unit,
            span=span / self.unit,
            lower_bound=lower_bound / self.unit,
        )

    def is_good_enough(self, span: int) -> bool:
        return max(self.total / self.ranks, float(self.costs[0])) >= _GOOD_ENOUGH * span


def _pack_one_barrier(step: _Step) -> StepPlan:
    ranks = _least_loaded(step.costs, step.ranks)
    slots = _best_fit(step.lengths, ranks, step.ranks, step.capacity)
    span = int(_sums(ranks, step.costs, step.ranks).max())
    return step.plan(ranks, slots, span, equal_counts=False)


def _least_loaded(costs: Ints, num_bins: int) -> Ints:
    """The bin of each cost (descending): always the least loaded so far, the first of equal ones.

    In rounds rather than one by one, with the same result: while no bin that has just been given something falls
    below one that waits, the waiting bins are simply served in order. A load carries its bin's number in its low bits.
    """
    shift, count = _bits(num_bins), len(costs)
    keys, steps, bins = np.arange(num_bins), costs << shift, np.empty(count, np.int64)
    done = 0
    while done < count:
        keys.sort()
        size = min(num_bins, count - done)
        limit = keys[0] + steps[done + size - 1]
        if keys[size - 1] > limit:
            size = int(keys.searchsorted(limit, "right"))
        bins[done : done + size] = keys[:size]
        keys[:size] += steps[done : done + size]
        done += size
    bins &= _mask(num_bins)
    return bins


def _best_fit(lengths: Ints, ranks: Ints, num_ranks: int, capacity: int) -> Ints:
    """The micro-batch of each sample (longest first) on its rank: the fullest with room, a new one where none has."""
    if num_ranks >= _FEW_RANKS:
        return _best_fit_in_rounds(lengths, ranks, num_ranks, capacity)
    slots = np.empty(len(lengths), np.int64)
    for rank in range(num_ranks):
        mine = np.flatnonzero(ranks == rank)
        slots[mine] = _best_fit_one_by_one(lengths[mine], capacity)
    return slots


def _best_fit_one_by_one(lengths: Ints, capacity: int) -> list[int]:
    shift = _bits(len(lengths))
    rooms: list[int] = []  # room left, with the bin's number in the low bits; ascending
    bins: list[int] = []
    for length in lengths.tolist():
        i = bisect_left(rooms, length << shift)
        key = rooms.pop(i) if i < len(rooms) else capacity << shift | len(rooms)
        bins.append(key & _mask(len(lengths)))
        insort(rooms, key - (length << shift))
    return bins


def _best_fit_in_rounds(lengths: Ints, ranks: Ints, num_ranks: int, capacity: int) -> Ints:
    """Best fit on all ranks at once: round j places the j-th longest sample of every rank."""
    keys = _with_index(ranks)
    keys.sort()
    samples = keys & _mask(len(lengths))
    owner = ranks[samples]
    counts = np.bincount(owner, minlength=num_ranks)
    turn = np.arange(len(lengths)) - (np.cumsum(counts) - counts)[owner]
    table = np.zeros((int(counts.max()), num_ranks), np.int32)
    table[turn, owner] = lengths[samples]
    num_bins = -(-int(_sums(ranks, lengths, num_ranks).max()) // capacity) + 1
    while (placed := _best_fit_table(table, num_bins, capacity)) is None:
        num_bins += 1 + num_bins // 8
    slots = np.empty(len(lengths), np.int64)
    slots[samples] = placed[turn, owner]
    return slots


def _best_fit_table(table: NDArray[np.int32], num_bins: int, capacity: int) -> NDArray[np.int32] | None:
    """Bins for the lengths [round, rank], or None where so many do not suffice. Zeros are no samples."""
    num_ranks = table.shape[1]
    room = np.full((num_ranks, num_bins), capacity, np.int32)
    left = np.empty_like(room)
    left_or_huge = left.view(np.uint32)  # what does not fit is negative, thus huge: the minimum is the best fit
    flat, start = room.reshape(-1), np.arange(num_ranks) * num_bins
    placed = np.empty(table.shape, np.int32)
    for lengths, bins in zip(table, placed, strict=True):
        np.subtract(room, lengths[:, None], out=left)
        best = left_or_huge.argmin(axis=1)
        bins[:] = best
        best += start
        flat[best] -= lengths
    return None if room.min() < 0 else placed


def _pack_equal_counts(step: _Step) -> StepPlan:
    """The fewest micro-batches that hold the samples, or more where that is much better (_WORTH_A_MICRO_BATCH).

    Bins are grouped into micro-batches by cost, dearest together: no grouping has a smaller Σ max.
    """
    fewest = max(-(-int(step.lengths.sum()) // step.capacity), int(np.count_nonzero(2 * step.lengths > step.capacity)))
    count = -(-fewest // step.ranks)
    bins = _fill_to_levels(step, count)
    if bins is None:
        return _pack_tightly(step, count)
    span = _grouped_span(step, bins, count)
    if not step.is_good_enough(span):
        more = _fill_to_levels(step, count + 1)
        if more is not None and _grouped_span(step, more, count + 1) < _WORTH_A_MICRO_BATCH * span:
            bins, count = more, count + 1
    return _plan_bins(step, bins, count)


def _pack_tightly(step: _Step, count: int) -> StepPlan:
    """Where levels do not fit in `count` micro-batches: best fit says how many surely suffice, levels may do better."""
    tight = np.array(_best_fit_one_by_one(step.lengths, step.capacity))
    enough = -(-(int(tight.max()) + 1) // step.ranks)
    best, best_span = (tight, enough), _grouped_span(step, tight, enough)
    for more in range(count + 1, enough + 2):
        bins = _fill_to_levels(step, more)
        if bins is not None and (span := _grouped_span(step, bins, more)) < best_span:
            return _plan_bins(step, bins, more)
    return _plan_bins(step, *best)


def _levels(step: _Step, count: int) -> Ints:
    """The cost to which each of `count` micro-batches should be filled, dearest first.

    The k-th is at least as dear as its longest sample when long samples keep company. Bins that hold a long sample
    cannot reach a dear level with short ones, for their tokens run out; what they lack the others must take.
    """
    num_bins = count * step.ranks
    heads = np.zeros((2, num_bins), np.int64)
    filled = min(num_bins, len(step.costs))
    heads[0, :filled], heads[1, :filled] = step.costs[:filled], step.lengths[:filled]
    least = heads[0, :: step.ranks]
    low = -(-step.total // num_bins)
    if least[0] <= low:
        return np.full(count, low)
    rest_cost, rest_tokens = int(step.costs[filled:].sum()), int(step.lengths[filled:].sum())
    density = rest_cost / rest_tokens if rest_tokens else float(step.costs[-1] / step.lengths[-1])
    reach = (heads[0] + ((step.capacity - heads[1]) * density).astype(np.int64)).reshape(count, step.ranks)
    high, exact = max(int(least[0]), 2 * low), low // 512
    while high - low > exact + 1:
        middle = (low + high) // 2
        enough = np.minimum(np.maximum(least, middle)[:, None], reach).sum() >= step.total
        low, high = (low, middle) if enough else (middle, high)
    return np.maximum(least, high)


def _fill_to_levels(step: _Step, count: int) -> Ints | None:
    """Longest first into count × ranks bins, each time the one furthest below its level; None if they do not fit.

    As _least_loaded, but a bin starts at the distance of its level from the highest, and one without room waits until
    samples are short enough.
    """
    num_bins = count * step.ranks
    shift, mask, total = _bits(num_bins), _mask(num_bins), len(step.costs)
    levels = _levels(step, count)
    keys = (np.repeat(levels.max() - levels, step.ranks) << shift) | np.arange(num_bins)
    steps, bins = step.costs << shift, np.empty(total, np.int64)
    room = np.full(num_bins, step.capacity)
    done = 0
    while done < total:
        keys.sort()
        open_ = np.flatnonzero(room[keys & mask] >= step.lengths[done])[: total - done]
        if not len(open_):
            return None
        waiting = keys[open_]
        size = int(waiting.searchsorted(waiting[0] + steps[done + len(open_) - 1], "right"))
        now, served = slice(done, done + size), waiting[:size] & mask
        keys[open_[:size]] += steps[now]
        room[served] -= step.lengths[now]
        bins[now] = served
        done += size
    return bins


def _grouped_span(step: _Step, bins: Ints, count: int) -> int:
    loads = np.sort(_sums(bins, step.costs, count * step.ranks))[::-1]
    return int(loads[:: step.ranks].sum())


def _plan_bins(step: _Step, bins: Ints, count: int, costs: Ints | None = None) -> StepPlan:
    """Micro-batch k of the ranks: the k-th dearest group of bins, dealt to and fro so that ranks come out even."""
    loads = _sums(bins, step.costs if costs is None else costs, count * step.ranks)
    by_cost = np.argsort(-loads, kind="stable")
    turn = np.empty_like(by_cost)
    turn[by_cost] = np.arange(len(by_cost))
    slots, ranks = np.divmod(turn, step.ranks)
    ranks = np.where(slots % 2 == 0, ranks, step.ranks - 1 - ranks)
    span = int(loads[by_cost[:: step.ranks]].sum())
    return step.plan(ranks[bins], slots[bins], span, equal_counts=True)


def _pack_padded(step: _Step) -> StepPlan:
    """Runs of the samples by length, none dearer than one level; the lowest level that needs no more micro-batches."""
    fit = step.capacity // step.lengths
    count = -(-len(_runs(fit)) // step.ranks)
    low, high = 0, int((fit * step.costs).max())
    while high - low > high // 512 + 1:
        middle = (low + high) // 2
        enough = len(_runs(np.clip(middle // step.costs, 1, fit))) <= count * step.ranks
        low, high = (low, middle) if enough else (middle, high)
    starts = _runs(np.clip(high // step.costs, 1, fit))
    bins = np.repeat(np.arange(len(starts)), np.diff([*starts, len(step.costs)]))
    return _plan_bins(step, bins, count, costs=step.costs[starts][bins])


def _runs(sizes: Ints) -> list[int]:
    """Where runs start if the one that starts at i has sizes[i] members."""
    following, starts, start = (np.arange(len(sizes)) + sizes).tolist(), [], 0
    while start < len(following):
        starts.append(start)
        start = following[start]
    return starts


def _collect(order: Ints, ranks: Ints, slots: Ints, num_ranks: int, equal_counts: bool) -> MicroBatches:
    width = int(slots.max()) + 1
    labels = ranks * width + slots
    keys = _with_index(labels, order)
    keys.sort()
    positions = keys & _mask(len(order))
    sizes = np.bincount(labels, minlength=num_ranks * width)
    ends = np.cumsum(sizes)
    pieces = [positions[a:b] for a, b in zip((ends - sizes).tolist(), ends.tolist(), strict=True)]
    rows = [pieces[start : start + width] for start in range(0, len(pieces), width)]
    if equal_counts:
        return rows
    return [[piece for piece in row if len(piece)] or row[:1] for row in rows]


def _sums(bins: Ints, values: Ints, num_bins: int) -> Ints:
    """Σ values by bin; exact, unlike bincount's weights."""
    sums = np.zeros(num_bins, np.int64)
    np.add.at(sums, bins, values)
    return sums


def _with_index(values: Ints, index: Ints | None = None) -> Ints:
    """Values with their index in the low bits: unique, so any sort of them has one result."""
    return (values << _bits(len(values))) | (np.arange(len(values)) if index is None else index)


def _bits(count: int) -> int:
    return (count - 1).bit_length()


def _mask(count: int) -> int:
    return (1 << _bits(count)) - 1
