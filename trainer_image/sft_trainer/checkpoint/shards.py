"""The state of one rank as a safetensors file: written as a stream, read by ranges, never a second copy in memory.

    master/<name>, exp_avg/<name>, exp_avg_sq/<name>    F32, the slice of the flattened parameter that the rank owns
    rank_state/<key>                                    U8, what belongs to the rank alone (random generators)
    __metadata__.pieces                                 JSON: each parameter's shape, its slice's start, Adam's step

The format is https://github.com/huggingface/safetensors#format. Its library makes a bytes object of every tensor
before it writes the first, and does not read from object stores; so the few lines are here, and tests hold them
against the library.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 22  # elements: 16 MiB
_ALIGN = 64
_RANK_STATE = "rank_state/"


class Piece(Protocol):
    """A slice of a parameter and its optimizer state, as `sft_trainer.state.Piece`. Arrays will do for tensors."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def tensors(self) -> Mapping[Any, Tensor | NDArray[np.float32]]: ...
    @property
    def step(self) -> int: ...


@dataclass(frozen=True)
class PieceRecord:
    """Which elements of a flattened parameter a shard holds: [start, start + count) of prod(shape)."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    step: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def total(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ShardHeader:
    """A shard's table of contents."""

    pieces: dict[str, PieceRecord]
    """By parameter's name."""
    extents: dict[str, tuple[int, int]]
    """For each tensor its first byte and the one after its last, from the start of the file."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max((stop for _, stop in self.extents.values()), default=0)

    @property
    def rank_state_keys(self) -> list[str]:
        return [key.removeprefix(_RANK_STATE) for key in self.extents if key.startswith(_RANK_STATE)]

    def rank_state_extent(self, key: str) -> tuple[int, int]:
        return self.extents[_RANK_STATE + key]

    def extent(self, key: str, name: str, start: int, stop: int) -> tuple[int, int]:
        """Bytes of the elements [start, stop) of the flattened parameter, which the piece must hold."""
        first, _ = self.extents[f"{key}/{name}"]
        offset = self.pieces[name].start
        return first + 4 * (start - offset), first + 4 * (stop - offset)


def encode_header(pieces: Sequence[Piece], rank_state: Mapping[str, bytes]) -> bytes:
    """The file up to the first tensor's bytes."""
    header: dict[str, object] = {}
    position = 0

    def add(key: str, dtype: str, count: int, size: int) -> None:
        nonlocal position
        assert key not in header, f"{key} twice on one rank"
        header[key] = {"dtype": dtype, "shape": [count], "data_offsets": [position, position + size]}
        position += size

    for piece in pieces:
        for key, tensor in piece.tensors.items():
            add(f"{key}/{piece.name}", "F32", len(tensor), 4 * len(tensor))
    for name, data in rank_state.items():
        add(_RANK_STATE + name, "U8", len(data), len(data))
    records = {
        piece.name: {
            "shape": list(piece.shape),
            "start": piece.start,
            "count": len(next(iter(piece.tensors.values()))),
            "step": piece.step,
        }
        for piece in pieces
    }
    text = json.dumps({"__metadata__": {"format": "sftjob-1", "pieces": json.dumps(records)}, **header}).encode()
    text += b" " * (-(LENGTH.size + len(text)) % _ALIGN)
    return LENGTH.pack(len(text)) + text


def decode_header(text: bytes) -> ShardHeader:
    """From the JSON, without the length before it. ValueError or KeyError if it is not a shard's."""
    header = json.loads(text)
    records = json.loads(header.pop("__metadata__")["pieces"])
    pieces = {
        name: PieceRecord(name, tuple(r["shape"]), r["start"], r["count"], r["step"]) for name, r in records.items()
    }
    base = LENGTH.size + len(text)
    extents = {key: (base + entry["data_offsets"][0], base + entry["data_offsets"][1]) for key, entry in header.items()}
    return ShardHeader(pieces, extents)


def write_shard(path: Path, pieces: Sequence[Piece], rank_state: Mapping[str, bytes]) -> int:
    """Write a shard to a new file; bytes written. OSError where it does not fit: the room is taken up front."""
    header = encode_header(pieces, rank_state)
    size = len(header) + sum(4 * len(t) for piece in pieces for t in piece.tensors.values())
    size += sum(len(data) for data in rank_state.values())
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)
        for piece in pieces:
            for tensor in piece.tensors.values():
                _write_tensor(file, tensor)
        for data in rank_state.values():
            file.write(data)
        assert file.tell() == size, (file.tell(), size)
    return size


def _write_tensor(file: BinaryIO, tensor: Tensor | NDArray[np.float32]) -> None:
    for start in range(0, len(tensor), _CHUNK):
        file.write(_on_host(tensor[start : start + _CHUNK]).data)


def _on_host(values: Tensor | NDArray[np.float32]) -> NDArray[np.float32]:
    array = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    assert array.dtype == np.float32, array.dtype
    assert array.ndim == 1, array.ndim
    return np.ascontiguousarray(array)


def read_header(path: Path) -> ShardHeader:
    """The header of a local shard."""
    with path.open("rb") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        return decode_header(file.read(length))


def masters(path: Path) -> Iterator[tuple[PieceRecord, NDArray[np.float32]]]:
    """The master slices of a local shard, memory-mapped."""
    header = read_header(path)
    for piece in header.pieces.values():
        start, _ = header.extent("master", piece.name, piece.start, piece.stop)
        if piece.count:
            yield piece, np.memmap(path, np.float32, "r", start, (piece.count,))
