"""How benchmarks measure and report: runs that alternate, medians with their spread, a table or JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once or more."""

    values: tuple[float, ...]
    unit: str = ""

    @classmethod
    def of(cls, values: float | Iterable[float], unit: str = "") -> Figure:
        return cls((float(values),) if isinstance(values, int | float) else tuple(values), unit)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> dict[str, object]:
        low, high = min(self.values), max(self.values)
        return {"median": self.median, "min": low, "max": high, "runs": len(self.values), "unit": self.unit}

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if len(self.values) == 1:
            return f"{_short(self.median)}{unit}"
        return f"{_short(self.median)}{unit} ({_short(min(self.values))} to {_short(max(self.values))})"


@dataclass(frozen=True)
class Comparison:
    """One line of a report: ours beside a peer's."""

    what: str
    ours: Figure
    peer: Figure | None = None
    peer_name: str = ""
    higher_is_better: bool = False
    target: float | None = None
    """What ours is asked to reach: at least this where higher is better, else at most."""

    @property
    def ratio(self) -> float | None:
        """How many times better ours is than the peer's, by medians; none without a peer, or where one is zero."""
        if self.peer is None or not self.ours.median or not self.peer.median:
            return None
        ratio = self.ours.median / self.peer.median
        return ratio if self.higher_is_better else 1 / ratio

    @property
    def holds(self) -> bool | None:
        if self.target is None:
            return None
        return self.ours.median >= self.target if self.higher_is_better else self.ours.median <= self.target

    def to_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "ours": self.ours.to_json(),
            "peer": self.peer.to_json() if self.peer else None,
            "peerName": self.peer_name or None,
            "ratio": self.ratio,
            "higherIsBetter": self.higher_is_better,
            "target": self.target,
            "holds": self.holds,
        }

    def cells(self) -> tuple[str, ...]:
        target = ""
        if self.target is not None:
            target = f"{'≥' if self.higher_is_better else '≤'} {_short(self.target)} {'yes' if self.holds else 'NO'}"
        peer = f"{self.peer} {self.peer_name}" if self.peer else ""
        return self.what, str(self.ours), peer, f"{_short(self.ratio)}x" if self.ratio else "", target


@dataclass(frozen=True)
class Report:
    """Everything one benchmark found."""

    benchmark: str
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)

    def print(self, output: str) -> None:
        """Print as `json` or as a `table`."""
        print(json.dumps(self.to_json(), indent=2) if output == "json" else self.to_table(), flush=True)

    def to_json(self) -> dict[str, object]:
        return {
            "benchmark": self.benchmark,
            "machine": machine(),
            "versions": dict(self.versions),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "notes": self.notes,
        }

    def to_table(self) -> str:
        rows = [("", "ours", "peer", "ratio", "target"), *(comparison.cells() for comparison in self.comparisons)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        about = ", ".join(f"{name} {value}" for name, value in {**machine(), **self.versions}.items())
        return "\n".join([f"{self.benchmark}: median (min to max)", *lines, *self.notes, about])


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="what to print")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured runs of each contender ({rounds})")
    return parser


def alternate(
    rounds: int, clock: Callable[[], float] = time.perf_counter, **contenders: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of each contender, run in turns so that a busy machine is busy for all; one run of each is not counted.

    The order is turned round every time, so that none always runs in another's wake. A clock of the processor's time
    (time.process_time) leaves out what other programs took of it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name in names:
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
        names.reverse()
    return seconds


def machine() -> dict[str, str]:
    """Where it was measured."""
    load = f"{os.getloadavg()[0]:.1f}"
    return {"python": platform.python_version(), "cpu": _cpu(), "cores": str(os.cpu_count()), "load": load}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _short(value: float) -> str:
    """Four figures are more than any of these measurements knows."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
