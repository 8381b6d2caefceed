"""Reading a checkpoint back: any slice of any parameter, whatever the sharding, and the proof that it is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sft_api.run import ExitCode, RunError
from sft_trainer.checkpoint.records import CheckpointMeta, FileRecord, Manifest
from sft_trainer.checkpoint.shards import LENGTH, PieceRecord, ShardHeader, decode_header
from sft_trainer.store import ObjectMissing, Store

_THREADS = 8
_READ_BYTES = 32 * 1024 * 1024  # a request's worth; with the threads, what a read holds besides its result
_HEADER_BYTES = 1 << 20  # read at once, in the hope that it holds the header
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Checkpoint:
    """A complete checkpoint. State is read by slices: never more of it in memory than was asked for.

    Is a `sft_trainer.state.StateSource`. Methods may be called from any thread.
    """

    def __init__(self, folder: Store, manifest: Manifest, committed: float):
        """Use `newest_complete` or `open_checkpoint`. `folder`: the store at the checkpoint's own prefix."""
        self._folder = folder
        self.manifest = manifest
        self.committed = committed
        """Unix time of the commit."""

    @property
    def meta(self) -> CheckpointMeta:
        return self.manifest.meta

    @property
    def attempt(self) -> int:
        return self.manifest.attempt

    @property
    def parameters_digest(self) -> str:
        return self.manifest.parameters_digest

    @property
    def uri(self) -> str:
        return self._folder.uri

    @property
    def size(self) -> int:
        """Bytes of its shards."""
        return sum(shard.size for shard in self.manifest.shards)

    def read(self, name: str, key: str, start: int, stop: int) -> NDArray[np.float32]:
        """The elements [start, stop) of a flattened parameter's `master`, `exp_avg` or `exp_avg_sq`.

        RunError where the checkpoint does not hold them: it is of another model.
        """
        values = np.empty(stop - start, np.float32)
        requests = []
        position = start
        for shard, piece in self._pieces.get(name, []):
            first, last = max(position, piece.start), min(stop, piece.stop)
            if first >= last or first != position:
                continue
            begin, end = self._headers[shard].extent(key, name, first, last)
            requests += list(_split(shard, begin, end, 4 * (first - start)))
            position = last
        if position < stop:
            raise self._lacks(f"elements {position} to {stop} of {name}")

        def fetch(request: tuple[int, int, int, int]) -> None:
            shard, begin, end, offset = request
            data = self._read_bytes(shard, begin, end)
            values[offset // 4 : (offset + end - begin) // 4] = np.frombuffer(data, np.float32)

        _in_parallel(fetch, requests)
        return values

    def adam_step(self, name: str) -> int:
        """Adam's step count for a parameter."""
        if name not in self._pieces:
            raise self._lacks(name)
        return self._pieces[name][0][1].step

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by name."""
        return {name: pieces[0][1].shape for name, pieces in self._pieces.items()}

    def rank_state(self, rank: int) -> dict[str, bytes] | None:
        """What that rank gave to its save; None where the checkpoint has no such rank."""
        if rank >= len(self.manifest.shards):
            return None
        header = self._header(rank)
        return {key: self._read_bytes(rank, *header.rank_state_extent(key)) for key in header.rank_state_keys}

    def verify(self, ranks: range | None = None) -> str | None:
        """Read the shards through and compare size and checksum; what is wrong, naming the object, or None.

        `ranks`: only these shards, so that the ranks of a gang may share the work.
        """
        shards = self.manifest.shards if ranks is None else [self.manifest.shards[rank] for rank in ranks]
        problems = _in_parallel(partial(what_is_wrong, self._folder), shards)
        return next((problem for problem in problems if problem), None)

    @cached_property
    def _headers(self) -> list[ShardHeader]:
        return _in_parallel(self._header, range(len(self.manifest.shards)))

    @cached_property
    def _pieces(self) -> Mapping[str, list[tuple[int, PieceRecord]]]:
        """For each parameter its slices with their shards, in the order of the elements."""
        pieces: dict[str, list[tuple[int, PieceRecord]]] = {}
        for shard, header in enumerate(self._headers):
            for piece in header.pieces.values():
                pieces.setdefault(piece.name, []).append((shard, piece))
        return {name: sorted(of, key=lambda item: item[1].start) for name, of in pieces.items()}

    def _header(self, shard: int) -> ShardHeader:
        head = self._folder.get_range(self.manifest.shards[shard].file, 0, _HEADER_BYTES)
        (length,) = LENGTH.unpack(head[: LENGTH.size])
        text = head[LENGTH.size : LENGTH.size + length]
        if len(text) < length:
            text += self._read_bytes(shard, LENGTH.size + len(text), LENGTH.size + length)
        return decode_header(text)

    def _read_bytes(self, shard: int, start: int, stop: int) -> bytes:
        file = self.manifest.shards[shard].file
        data = self._folder.get_range(file, start, stop)
        if len(data) != stop - start:
            raise RunError(
                ExitCode.STORE_UNAVAILABLE,
                f"{self.uri}/{file} ends before byte {stop:,}: it has changed since it was checked",
            )
        return data

    def _lacks(self, what: str) -> RunError:
        message = f"the checkpoint at {self.uri} does not hold {what}: it is of another model"
        return RunError(ExitCode.CONFIGURATION, message, "spec.checkpoints.uri")


def what_is_wrong(folder: Store, shard: FileRecord) -> str | None:
    """Read an object through and compare size and checksum; the difference, naming the object, or None."""
    uri = f"{folder.uri}/{shard.file}"
    try:
        digest, size = hashlib.sha256(), 0
        with folder.open_reader(shard.file) as reader:
            while block := reader.read(_READ_BYTES):
                digest.update(block)
                size += len(block)
    except ObjectMissing:
        return f"{uri} is missing"
    if size != shard.size:
        return f"{uri} has {size:,} bytes instead of {shard.size:,}"
    if digest.hexdigest() != shard.sha256:
        return f"{uri} has another checksum than when it was written"
    return None


def _in_parallel(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, items))


def _split(shard: int, begin: int, end: int, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """The bytes [begin, end) of a shard, which belong at `offset`, as requests of a size that can be repeated."""
    for first in range(begin, end, _READ_BYTES):
        yield shard, first, min(first + _READ_BYTES, end), offset + first - begin
