"""Batches of samples to Arrow shards in the store, committed as a whole: shards, then summary.json, then COMPLETE.

What lacks COMPLETE was never there. The same input gives the same bytes, so two jobs that prepare the same data at
once do not disturb each other.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from sft_api import names
from sft_api.base import ApiModel
from sft_api.events import PreviewMessage
from sft_api.run import ExitCode, RunError
from sft_trainer.prepare.pool import SCHEMA
from sft_trainer.prepare.samples import Tally
from sft_trainer.store import Store

SUMMARY = "summary.json"
BATCH_TOKENS = 1 << 20
"""Tokens of a record batch within a shard, about."""
BATCH_SAMPLES = 1 << 14
SHARD_BYTES = 128 << 20


class Shard(ApiModel):
    """One Arrow IPC file."""

    key: str
    samples: int
    bytes: int
    sha256: str


class SourceFile(ApiModel):
    """One input file, as it was."""

    name: str
    bytes: int
    sha256: str


class Summary(ApiModel):
    """`summary.json`: what prepared data holds and what was left out of it."""

    fingerprint: str
    samples: int
    tokens: int
    loss_tokens: int
    longest: int
    """Tokens of the longest sample."""
    records: int
    """Records read."""
    dropped: dict[str, int]
    """Records left out, by reason."""
    truncated: int
    """Conversations that lost their end."""
    split: int
    """Documents that became several samples; nothing of them is lost."""
    files: list[SourceFile]
    shards: list[Shard]
    preview: list[list[PreviewMessage]]


class ShardWriter:
    """Collects batches, writes them to shards, and puts each full shard into the store. Holds one batch at a time."""

    def __init__(self, store: Store):
        """`store`: at the prefix of this data."""
        self._store = store
        self._folder = tempfile.TemporaryDirectory(prefix="sft-prepare-")
        self._pending: list[pa.RecordBatch] = []
        self._pending_tokens = self._pending_samples = 0
        self._shard_samples = 0
        self._file: pa.RecordBatchFileWriter | None = None
        self.shards: list[Shard] = []
        self.samples = self.tokens = self.loss_tokens = self.longest = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An open file is left to its destructor: closing it would write, perhaps to the disk that has just failed.
        self._folder.cleanup()

    def add(self, batch: pa.RecordBatch) -> None:
        """Append samples, in the order of the call."""
        if not batch.num_rows:
            return
        lengths = batch.column("length").to_numpy()
        tokens = int(lengths.sum(dtype="int64"))
        self.samples += batch.num_rows
        self.tokens += tokens
        self.loss_tokens += int(batch.column("num_loss_tokens").to_numpy().sum(dtype="int64"))
        self.longest = max(self.longest, int(lengths.max()))
        self._pending.append(batch)
        self._pending_tokens += tokens
        self._pending_samples += batch.num_rows
        if self._pending_tokens >= BATCH_TOKENS or self._pending_samples >= BATCH_SAMPLES:
            self._flush()

    def finish(self) -> list[Shard]:
        """Write what is left. Returns all shards; they are in the store."""
        self._flush()
        self._end_shard()
        return self.shards

    @property
    def _path(self) -> Path:
        return Path(self._folder.name, f"shard-{len(self.shards):05d}.arrow")

    def _flush(self) -> None:
        if not self._pending:
            return
        batches = pa.Table.from_batches(self._pending).combine_chunks().to_batches()
        with self._disk_errors():
            if self._file is None:
                self._file = pa.ipc.new_file(str(self._path), SCHEMA)
            for batch in batches:
                self._file.write_batch(batch)
        self._shard_samples += self._pending_samples
        self._pending, self._pending_tokens, self._pending_samples = [], 0, 0
        if self._path.stat().st_size >= SHARD_BYTES:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with self._disk_errors():
            file.close()
        path = self._path
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard = Shard(key=path.name, samples=self._shard_samples, bytes=path.stat().st_size, sha256=sha256)
        self._store.put(path.name, path)
        path.unlink()
        self.shards.append(shard)
        self._shard_samples = 0

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn a full disk here, before anything reaches the store, into RunError."""
        try:
            yield
        except OSError as error:
            message = (
                f"a shard cannot be written to {self._folder.name}: {error}. Free some space there "
                f"({SHARD_BYTES >> 20} MiB are enough), or name another folder in TMPDIR."
            )
            raise RunError(ExitCode.STORE_REFUSED, message) from error


def summarise(
    fingerprint: str,
    writer: ShardWriter,
    tally: Tally,
    files: Iterable[SourceFile],
    preview: list[list[PreviewMessage]],
) -> Summary:
    return Summary(
        fingerprint=fingerprint,
        samples=writer.samples,
        tokens=writer.tokens,
        loss_tokens=writer.loss_tokens,
        longest=writer.longest,
        records=tally.records,
        dropped=dict(sorted(Counter(tally.dropped).items())),
        truncated=tally.truncated,
        split=tally.split,
        files=list(files),
        shards=writer.shards,
        preview=preview,
    )


def commit(store: Store, summary: Summary) -> None:
    """Make prepared data count. `store`: at its prefix."""
    text = summary.model_dump_json(by_alias=True, indent=1).encode()
    store.put(SUMMARY, text)
    store.make_durable([*(shard.key for shard in summary.shards), SUMMARY])
    # Whoever else prepared the same data at the same time wrote the same bytes: it does not matter who is first.
    store.create(names.COMPLETE, hashlib.sha256(text).hexdigest().encode())
    store.make_durable([names.COMPLETE])


def committed(store: Store) -> Summary | None:
    """The summary of prepared data, if it is complete. `store`: at its prefix."""
    if store.head(names.COMPLETE) is None:
        return None
    return Summary.model_validate_json(store.get(SUMMARY))
