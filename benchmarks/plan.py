"""Planning one optimizer step: time, memory and cost utilisation, beside instructlab-training's packers.

    python -m benchmarks.plan [-o json] [--rounds N]

The peer is instructlab-training 0.16.2, of which two modules are loaded by file (the package itself imports torch).
They need numba. The extra `bench` has both; by hand, without the rest of the package:

    pip install --no-deps instructlab-training==0.16.2 && pip install "numba>=0.61.2"

Both sides plan the same lengths. A rank of either plans for itself, so time and memory are those of one rank; ours
makes the whole plan in that time, the peer the share of one rank. Both are one thread, so that on a busy machine
processor time tells about the planners and the wall clock about the neighbours; the size asked for has both.
Utilisation is Σ cost / (ranks · Σ over barriers of the dearest rank), cost = l + l²/57,000. Memory is the growth of the
peak resident set of a fresh process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reporting import Comparison, Figure, Report, alternate, arguments
from sft_trainer.plan import StepPlan, pack, pack_padded, permutation, sample_cost

PEER = "instructlab-training"
PEER_VERSION = "0.16.2"
QUADRATIC_LENGTH = 57_000.0
CAPACITY = 32_768
TARGET_MS, TARGET_MB, TARGET_UTILISATION = 3.0, 10.0, 0.99

Lengths = NDArray[np.int64]


class PeerMissing(Exception):
    """The peer is not installed."""


@dataclass(frozen=True)
class Size:
    samples: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.samples:,} samples x {self.ranks} ranks"


ASKED = Size(7_680, 64)
SIZES = (Size(128, 8), Size(3_840, 8), Size(7_680, 8), ASKED)


def lognormal(samples: int, seed: int = 0) -> Lengths:
    """Chat data: mean 600 tokens, 16 to 8,192."""
    drawn = np.random.default_rng(seed).lognormal(np.log(600) - 0.32, 0.8, samples)
    return np.clip(drawn.astype(np.int64), 16, 8_192)


def long_tailed(samples: int, seed: int = 0) -> Lengths:
    """The same, but 5 % of the samples are long: mean 8,000 tokens, up to the capacity."""
    generator = np.random.default_rng(seed)
    lengths = lognormal(samples, seed)
    is_long = generator.random(samples) < 0.05
    lengths[is_long] = np.clip(generator.exponential(8_000, int(is_long.sum())).astype(np.int64), 16, CAPACITY)
    return lengths


@cache
def peer_module(name: str) -> ModuleType:
    """A module of the peer, without importing its package."""
    try:
        if (version := importlib.metadata.version(PEER)) != PEER_VERSION:
            raise PeerMissing(f"{PEER} {version} is installed")
        file = Path(str(importlib.metadata.distribution(PEER).locate_file(f"instructlab/training/{name}.py")))
        spec = importlib.util.spec_from_file_location(f"peer_{name}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:  # the package, or numba
        raise PeerMissing(str(error)) from error
    return module


def peer_packed(lengths: Lengths, ranks: int, rank: int = 0, capacity: int = CAPACITY) -> list[list[int]]:
    packer = peer_module("batch_packer").batch_lengths_to_minibatches_lpt
    return _without_dummies(packer(lengths.tolist(), capacity, ranks, rank))


def peer_padded(lengths: Lengths, ranks: int, rank: int = 0, capacity: int = CAPACITY) -> list[list[int]]:
    packer = peer_module("padded_batch_packer").batch_lengths_to_minibatches_padded
    return _without_dummies(packer(lengths.tolist(), capacity, ranks, rank))


def _without_dummies(micro_batches: Any) -> list[list[int]]:
    return [[position for position in micro_batch if position >= 0] for micro_batch in micro_batches]


def one_barrier(lengths: Lengths, ranks: int) -> StepPlan:
    return pack(lengths, ranks, CAPACITY, QUADRATIC_LENGTH, equal_counts=False)


def equal_counts(lengths: Lengths, ranks: int) -> StepPlan:
    return pack(lengths, ranks, CAPACITY, QUADRATIC_LENGTH, equal_counts=True)


def padded(lengths: Lengths, ranks: int, capacity: int = CAPACITY) -> StepPlan:
    return pack_padded(lengths, ranks, capacity, QUADRATIC_LENGTH)


OURS: dict[str, Callable[[Lengths, int], StepPlan]] = {
    "one barrier": one_barrier,
    "equal counts": equal_counts,
    "padded": padded,
}
PEERS: dict[str, Callable[..., list[list[int]]]] = {
    "one barrier": peer_packed,
    "equal counts": peer_packed,
    "padded": peer_padded,
}


def compare_time(size: Size, rounds: int, clock: Callable[[], float], clock_name: str) -> list[Comparison]:
    """Milliseconds of a step's plan."""
    lengths = long_tailed(size.samples)
    runs: dict[str, Callable[[], object]] = {name: partial(plan, lengths, size.ranks) for name, plan in OURS.items()}
    runs |= {"packed peer": partial(peer_packed, lengths, size.ranks)}
    runs |= {"padded peer": partial(peer_padded, lengths, size.ranks)}
    seconds = alternate(rounds, clock, **runs)
    figures = {name: Figure.of((1e3 * value for value in values), "ms") for name, values in seconds.items()}
    return [
        Comparison(
            f"{clock_name} time, {size}, {name}",
            figures[name],
            figures["padded peer" if name == "padded" else "packed peer"],
            PEER,
            target=TARGET_MS if size == ASKED and name != "padded" else None,
        )
        for name in OURS
    ]


def compare_memory(size: Size) -> list[Comparison]:
    """Megabytes by which the peak of the resident set grows while a step is planned."""
    return [
        Comparison(
            f"memory, {size}, {name}",
            Figure.of(_in_fresh_process(OURS[name], size), "MB"),
            Figure.of(_in_fresh_process(PEERS[name], size), "MB"),
            PEER,
            target=TARGET_MB,
        )
        for name in OURS
    ]


def _in_fresh_process(plan: Callable[[Lengths, int], object], size: Size) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_growth, (plan, size))


def _peak_growth(plan: Callable[[Lengths, int], object], size: Size) -> float:
    lengths = long_tailed(size.samples)
    plan(lengths[: size.ranks], size.ranks)  # compiles the peer, and loads what either loads but once
    before = _peak_bytes()
    plan(lengths, size.ranks)
    return (_peak_bytes() - before) / 1e6


def _peak_bytes() -> int:
    """The peak of this process's resident set; getrusage's would include that of the process that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def compare_utilisation(size: Size, data: Callable[[int], Lengths]) -> list[Comparison]:
    """Cost utilisation of one step, as a share of what is possible at best."""
    lengths, found = data(size.samples), []
    shares = {packer: _peer_costs(lengths, size.ranks, packer) for packer in (peer_packed, peer_padded)}
    for name, plan in OURS.items():
        ours, costs = plan(lengths, size.ranks), shares[PEERS[name]]
        span = costs.sum(axis=1).max() if name == "one barrier" else costs.max(axis=0).sum()
        found.append(
            Comparison(
                f"utilisation / bound, {data.__name__}, {size}, {name}",
                Figure.of(ours.efficiency / ours.bound),
                Figure.of(ours.lower_bound / span),
                PEER,
                higher_is_better=True,
                target=TARGET_UTILISATION if name == "one barrier" else None,
            )
        )
    return found


def _peer_costs(lengths: Lengths, ranks: int, packer: Callable[..., list[list[int]]]) -> NDArray[np.float64]:
    """What the peer's micro-batches cost, [rank, k]."""
    mine = [[_cost(lengths[batch], packer) for batch in packer(lengths, ranks, rank)] for rank in range(ranks)]
    width = max(len(costs) for costs in mine)
    return np.array([costs + [0.0] * (width - len(costs)) for costs in mine])


def _cost(lengths: Lengths, packer: Callable[..., list[list[int]]]) -> float:
    costs = sample_cost(lengths, QUADRATIC_LENGTH)
    if not len(costs):
        return 0.0
    return float(costs.max() * len(costs) if packer is peer_padded else costs.sum())


def compare_hangs(size: Size, capacity: int, steps: int) -> Comparison:
    """Steps in which ranks have different numbers of padded micro-batches: each would hang a run."""
    ours = peer = 0
    for step in range(steps):
        lengths = lognormal(size.samples, seed=step)
        ours += len({len(mine) for mine in padded(lengths, size.ranks, capacity).micro_batches}) > 1
        peer += len({len(peer_padded(lengths, size.ranks, rank, capacity)) for rank in range(size.ranks)}) > 1
    what = f"steps of {steps} in which padded counts differ by rank, {size}, capacity {capacity:,}"
    return Comparison(what, Figure.of(ours), Figure.of(peer), PEER, target=0)


def compare_dropped(samples: int, size: Size) -> Comparison:
    """Samples of one epoch that no rank trains on; the peer's sampler, too, gives its packer all of them in turn."""
    lengths, order = long_tailed(samples), permutation(samples, seed=0, phase=0, epoch=0)
    ours = peer = samples
    for start in range(0, samples, size.samples):
        step = lengths[order[start : start + size.samples]]
        ours -= sum(len(batch) for mine in one_barrier(step, size.ranks).micro_batches for batch in mine)
        peer -= sum(len(batch) for rank in range(size.ranks) for batch in peer_packed(step, size.ranks, rank))
    what = f"samples dropped of {samples:,} in an epoch, {size}"
    return Comparison(what, Figure.of(ours), Figure.of(peer), PEER, target=0)


def main() -> int:
    options = arguments(__doc__, rounds=11).parse_args()
    try:
        peer_module("batch_packer")
        peer_module("padded_batch_packer")
    except PeerMissing as error:
        print(f"The peer is missing ({error}). Install it:", file=sys.stderr)
        print(f'  pip install --no-deps {PEER}=={PEER_VERSION} && pip install "numba>=0.61.2"', file=sys.stderr)
        return 1
    comparisons = compare_time(ASKED, options.rounds, time.perf_counter, "wall")
    for size in SIZES:
        comparisons += compare_time(size, options.rounds, time.process_time, "processor")
    comparisons += compare_memory(ASKED)
    for data in (lognormal, long_tailed):
        for size in (Size(3_840, 8), ASKED):
            comparisons += compare_utilisation(size, data)
    comparisons.append(compare_hangs(Size(128, 8), capacity=10_000, steps=200))
    comparisons.append(compare_dropped(20_000, Size(3_840, 8)))
    versions = {"numpy": np.__version__, PEER: PEER_VERSION, "numba": importlib.metadata.version("numba")}
    Report("plan", comparisons, versions=versions).print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
