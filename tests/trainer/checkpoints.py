"""Builders for tests of checkpoints: state as arrays, cut as ranks would hold it, saved by a gang of threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_api import names
from sft_api.spec import Keep
from sft_trainer.checkpoint import CheckpointMeta, CheckpointWriter
from sft_trainer.store import ObjectInfo, Store
from sft_trainer.store_pace import Pace
from tests.s3 import S3Server

KEYS = ("master", "exp_avg", "exp_avg_sq")
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 4),
    "layer.weight": (3, 5),
    "norm.weight": (7,),
    "bias": (1,),
}
FINGERPRINTS = {"model": "m1", "data": "d1"}

KEEP_ALL = Keep(last=100)
State = dict[str, dict[str, NDArray[np.float32]]]


@dataclass
class ArrayPiece:
    """A slice of a parameter as the engine's `Piece` has it, in numpy."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[Any, NDArray[np.float32]]
    step: int = 5


def make_state(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> State:
    """For each parameter its master and moments, flat."""
    random = np.random.default_rng(seed)
    return {n: {k: random.standard_normal(int(np.prod(s)), np.float32) for k in KEYS} for n, s in shapes.items()}


def slices(world: int, rank: int, by_parameter: bool) -> Iterator[tuple[str, int, int]]:
    """Name, start and stop of what a rank holds: of all parameters in a row (ZeRO 1), or of each (ZeRO 3)."""
    position, total = 0, sum(int(np.prod(shape)) for shape in SHAPES.values())
    share = -(-total // world)
    for name, shape in SHAPES.items():
        count = int(np.prod(shape))
        if by_parameter:
            each = -(-count // world)
            start, stop = min(rank * each, count), min((rank + 1) * each, count)
        else:
            start, stop = (min(max(edge - position, 0), count) for edge in (rank * share, (rank + 1) * share))
        if start < stop:
            yield name, start, stop
        position += count


def make_pieces(state: State, world: int = 1, rank: int = 0, by_parameter: bool = False) -> list[ArrayPiece]:
    return [
        ArrayPiece(name, SHAPES[name], start, {key: state[name][key][start:stop] for key in KEYS})
        for name, start, stop in slices(world, rank, by_parameter)
    ]


def make_meta(step: int = 1, world: int = 1, **other: Any) -> CheckpointMeta:
    defaults = {"phase": "skills", "epoch": 1, "cursor": {"step": step}, "samples": 10 * step, "zero_stage": 1}
    return CheckpointMeta(
        step=step, world_size=world, **{**defaults, "fingerprints": FINGERPRINTS, "time": 1e9 + step, **other}
    )


def claim(store: Store, attempt: int) -> None:
    """Take the attempt's number, as a run does before its ranks start."""
    store.create(names.attempt(attempt), b"")


def take_number_later(store: Store, server: S3Server, attempt: int, seconds: float) -> None:
    """Begin an attempt so much later, by the store's clock: the server shows a file's time as the object's."""
    store.create(names.attempt(attempt), b"")
    later = time.time() + seconds
    os.utime(server.folder / store.uri.removeprefix("s3://") / names.attempt(attempt), (later, later))


@dataclass
class Gang:
    """The writers of all ranks of one attempt."""

    store: Store
    staging: Path
    world: int = 1
    attempt: int = 1
    keep: Keep = KEEP_ALL
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        claim(self.store, self.attempt)
        options = {"patience": timedelta(seconds=20), **self.options}
        common = {"attempt": self.attempt, "world": self.world, "staging": self.staging, **options}
        common["keep"] = lambda: self.keep
        self.writers = [CheckpointWriter(self.store, rank=rank, **common) for rank in range(self.world)]

    def begin(self, state: State, step: int, by_parameter: bool = False, **meta: Any) -> None:
        """Stage on every rank and let the uploads begin."""
        for rank, writer in enumerate(self.writers):
            pieces = make_pieces(state, self.world, rank, by_parameter)
            writer.save(pieces, {"rng": f"{step} {rank}".encode()}, make_meta(step, self.world, **meta))

    def save(self, state: State, step: int, by_parameter: bool = False, **meta: Any) -> None:
        """A whole save, to its commit. Raises the first rank's failure."""
        self.begin(state, step, by_parameter, **meta)
        self.wait()

    def wait(self) -> None:
        for writer in self.writers:  # all ranks wait at the same step
            writer.has_settled(0.0)
        failures = []
        for writer in self.writers:
            try:
                writer.wait()
            except BaseException as failure:
                failures.append(failure)
        if failures:
            raise failures[0]


class Killed(BaseException):
    """The process is dead from here on."""


@dataclass
class Faults:
    """When to die, counted in operations that change the store; shared by all stores of the run."""

    fatal: int | None = None
    """Number of the operation before which all die; the first is 0."""
    done: list[str] = field(default_factory=list)
    """The operations that were carried out, as "put ckpt/…"."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def dead(self) -> bool:
        return self.fatal is not None and len(self.done) >= self.fatal

    def strike(self, operation: str, store: Store, keys: Sequence[str]) -> None:
        with self.lock:
            if self.dead:
                raise Killed(operation)
            self.done.append(f"{operation} {store.uri.rpartition('/x')[2]}/{' '.join(keys)}".replace(" /", " "))


class FaultyStore(Store):
    """A store whose process dies before a given operation, and is dead for every one after it."""

    faults: Faults

    @classmethod
    def over(cls, uri: str, faults: Faults) -> FaultyStore:
        store = cls.open(uri)
        assert isinstance(store, cls)
        store.faults = faults
        return store

    def put(self, key: str, data: bytes | Path, pace: Pace | None = None) -> None:
        self.faults.strike("put", self, [key])
        super().put(key, data, pace)

    def create(self, key: str, data: bytes) -> bool:
        self.faults.strike("create", self, [key])
        return super().create(key, data)

    def delete(self, keys: Any) -> None:
        keys = list(keys)
        self.faults.strike("delete", self, keys)
        super().delete(keys)

    def get(self, key: str) -> bytes:
        self._live()
        return super().get(key)

    def head(self, key: str) -> ObjectInfo | None:
        self._live()
        return super().head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._live()
        return super().list(prefix)

    def _live(self) -> None:
        if self.faults.dead:
            raise Killed


class GatedStore(Store):
    """A store whose uploads of checkpoint shards wait at a gate."""

    gate: threading.Event
    arrived: threading.Event
    done: list[str]

    @classmethod
    def over(cls, uri: str) -> GatedStore:
        store = cls.open(uri)
        assert isinstance(store, cls)
        store.gate, store.arrived, store.done = threading.Event(), threading.Event(), []
        return store

    def put(self, key: str, data: bytes | Path, pace: Pace | None = None) -> None:
        if isinstance(data, Path):
            self.arrived.set()
            assert self.gate.wait(60)
        super().put(key, data, pace)
        self.done.append(f"{self.uri}/{key}")

    def create(self, key: str, data: bytes) -> bool:
        self.done.append(f"{self.uri}/{key}")
        return super().create(key, data)


def read_state(checkpoint: Any, world: int = 1, by_parameter: bool = False) -> State:
    """The whole state, read as `world` ranks would: each its own slices."""
    state: State = {n: {k: np.full(int(np.prod(s)), np.nan, np.float32) for k in KEYS} for n, s in SHAPES.items()}
    for rank in range(world):
        for name, start, stop in slices(world, rank, by_parameter):
            for key in KEYS:
                state[name][key][start:stop] = checkpoint.read(name, key, start, stop)
    return state


def same(one: State, other: State) -> bool:
    """Bit-equal."""
    return all(one[n][k].tobytes() == other[n][k].tobytes() for n in SHAPES for k in KEYS)
