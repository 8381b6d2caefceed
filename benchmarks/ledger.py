"""What entered the weights that survive: the arithmetic of `benchmarks.resume`. Pure.

A run of several attempts is told as a list of entries, in the order in which things happened:

    begin   an attempt starts: from the base model, unless it loads a checkpoint
    load    it loads the checkpoint of that name
    step    the optimizer has stepped: on these samples, in that pass over the data (from 0)
    save    the weights are in the checkpoint of that name
    finish  the run says that it is done; the digest is that of its final parameters
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One optimizer step."""

    epoch: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class History:
    """One run, however often it was interrupted."""

    steps: tuple[Step, ...]
    """Those that the last weights went through, in order."""
    steps_taken: int
    """All that were ever taken."""
    attempts: int
    digest: str | None
    """Of the final parameters; none where the run never finished."""


@dataclass(frozen=True)
class Tally:
    """Samples against the schedule, which wants each of them once in every epoch."""

    lost: tuple[int, ...]
    """By epoch: samples that the weights never saw in it."""
    repeated: tuple[int, ...]
    """By epoch: how many times they saw a sample beyond the first."""


def history(entries: Iterable[dict[str, Any]]) -> History:
    """Follow the weights: a step survives if the last weights descend from it. KeyError: loaded, but never saved."""
    steps: tuple[Step, ...] = ()
    saved: dict[str, tuple[Step, ...]] = {}
    counts: Counter[str] = Counter()
    digest = None
    for entry in entries:
        counts[entry["event"]] += 1
        match entry["event"]:
            case "begin":
                steps, digest = (), None
            case "load":
                steps = saved[entry["checkpoint"]]
            case "step":
                steps = (*steps, Step(entry["epoch"], tuple(entry["samples"])))
            case "save":
                saved[entry["checkpoint"]] = steps
            case "finish":
                digest = entry["digest"]
    return History(steps, counts["step"], counts["begin"], digest)


def tally(steps: Sequence[Step], num_samples: int, epochs: int) -> Tally:
    """Count what `steps` hold of `num_samples` samples in each epoch."""
    seen = [
        Counter(sample for step in steps if step.epoch == epoch for sample in step.samples) for epoch in range(epochs)
    ]
    return Tally(
        lost=tuple(num_samples - len(counter) for counter in seen),
        repeated=tuple(counter.total() - len(counter) for counter in seen),
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
