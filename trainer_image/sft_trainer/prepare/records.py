"""Files as chunks of raw records: read and decompressed in one process, parsed in many. Memory is one chunk.

Where chunks end depends on the input alone, never on the number of processes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Buffer

from sft_api.run import ExitCode, RunError
from sft_api.spec import DataFormat
from sft_trainer.prepare.sources import DataFile, Kind

BLOCK_BYTES = 1 << 18
"""Size of a chunk of lines, and of a read."""
MAX_LINE_BYTES = 64 << 20
ROWS = 128
"""Rows in a chunk of a Parquet file."""

_COMPRESSION = {Kind.JSONL_GZIP: "gzip", Kind.JSONL_ZSTD: "zstd"}
_COLUMNS = {DataFormat.MESSAGES: ("messages", "tools", "unmask"), DataFormat.PRETRAINING: ("text",)}


class RecordError(Exception):
    """A record that is not what the format asks for. `where`: `line 12` or `row 12`; `what` is wrong with it."""

    def __init__(self, where: str, what: str):
        super().__init__(where, what)
        self.where = where
        self.what = what


@dataclass(frozen=True)
class Chunk:
    """Some consecutive records of one file, as bytes."""

    file: int
    """Index of the file."""
    first: int
    """Number of its first line or row, from 1."""
    payload: bytes
    """Lines, or an Arrow stream of one record batch."""
    rows: bool
    format: DataFormat

    def records(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Where each record stands, and the record. Blank lines are passed over. Raises RecordError."""
        return self._rows() if self.rows else self._lines()

    def _lines(self) -> Iterator[tuple[str, dict[str, object]]]:
        # Not splitlines: JSON strings may hold the other characters that it splits at.
        for number, line in enumerate(self.payload.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            where = f"line {number}"
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                what = f"is not JSON ({error.msg} at column {error.colno}): each line must hold one JSON object"
                raise RecordError(where, what) from error
            if not isinstance(record, dict):
                raise RecordError(where, f"is {_kind_of(record)}: each line must hold one JSON object")
            yield where, record

    def _rows(self) -> Iterator[tuple[str, dict[str, object]]]:
        with pa.ipc.open_stream(self.payload) as stream:
            rows = stream.read_all().to_pylist()
        for number, row in enumerate(rows, self.first):
            # Parquet gives every field of a struct to every row: null stands for "not there".
            yield f"row {number}", _without_nulls(row)


def read_chunks(file: DataFile, index: int, progress: Callable[[int], None]) -> Iterator[Chunk]:
    """The records of `file`, in order. `progress` hears how many of its bytes have been read so far.

    Raises RunError(DATA) where the file is empty or cannot be decompressed.
    """
    seen = False
    chunks = _parquet(file, index, progress) if file.kind is Kind.PARQUET else _jsonl(file, index, progress)
    for chunk in chunks:
        seen = True
        yield chunk
    if not seen:
        raise RunError(ExitCode.DATA, f"{file.name} is empty: it holds no record.", file.path)
    progress(file.size)


def _jsonl(file: DataFile, index: int, progress: Callable[[int], None]) -> Iterator[Chunk]:
    line = 1
    with file.open() as raw:
        for payload in _whole_lines(file, _Counting(raw, progress)):
            if line == 1:
                payload = payload.removeprefix(b"\xef\xbb\xbf")
            count = payload.count(b"\n")
            if payload.strip():
                yield Chunk(index, line, payload, rows=False, format=file.format)
            line += count


def _whole_lines(file: DataFile, raw: _Counting) -> Iterator[bytes]:
    """Blocks of about BLOCK_BYTES that end at a line's end, but for the last."""
    pending: list[bytes] = []
    line = 1
    try:
        for block in _blocks(file.kind, raw):
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                payload = b"".join([*pending, head, newline])
                line += payload.count(b"\n")
                yield payload
                pending = []
            pending.append(tail)
            if len(pending) * BLOCK_BYTES > MAX_LINE_BYTES:
                limit = f"longer than {MAX_LINE_BYTES >> 20} MiB: each line must hold one JSON object"
                raise RunError(ExitCode.DATA, f"{file.name}, line {line}: the line is {limit}.", file.path)
    except (OSError, pa.ArrowException) as error:
        message = f"{file.name}, line {line}: the file cannot be read from here on ({error})."
        raise RunError(ExitCode.DATA, message, file.path) from error
    if any(pending):
        yield b"".join(pending)


def _blocks(kind: Kind, raw: _Counting) -> Iterator[bytes]:
    compression = _COMPRESSION.get(kind)
    if compression is None:
        while block := raw.read(BLOCK_BYTES):
            yield block
        return
    with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _parquet(file: DataFile, index: int, progress: Callable[[int], None]) -> Iterator[Chunk]:
    row = 1
    with file.open() as raw:
        try:
            # Without pre-buffering, a column is read page by page: memory stays below one row group.
            parquet = pq.ParquetFile(pa.PythonFile(raw, mode="r"), pre_buffer=False)
            total = parquet.metadata.num_rows
            columns = _columns(file, parquet.schema_arrow.names)
            for batch in parquet.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
                yield Chunk(index, row, _as_stream(batch), rows=True, format=file.format)
                row += batch.num_rows
                progress(file.size * (row - 1) // total)
        except (OSError, pa.ArrowException) as error:
            message = f"{file.name}, row {row}: not readable as Parquet ({error})."
            raise RunError(ExitCode.DATA, message, file.path) from error


def _columns(file: DataFile, names: list[str]) -> list[str]:
    required, *optional = _COLUMNS[file.format]
    if required not in names:
        message = (
            f"{file.name} has no column {required!r}, which format {file.format} needs; it has {', '.join(names)}."
        )
        raise RunError(ExitCode.DATA, message, file.path)
    return [required, *(name for name in optional if name in names)]


def _as_stream(batch: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _without_nulls(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return {key: _clean(item) for key, item in value.items() if item is not None}


def _clean(value: object) -> object:
    if isinstance(value, dict):
        return _without_nulls(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _kind_of(value: object) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(value), "null")


class _Counting(io.RawIOBase):
    """A reader that tells how many bytes went through it."""

    def __init__(self, raw: BinaryIO, progress: Callable[[int], None]):
        self._raw = raw
        self._progress = progress
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        block = self._raw.read(len(view))
        view[: len(block)] = block
        self._count += len(block)
        self._progress(self._count)
        return len(block)
