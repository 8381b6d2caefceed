"""Prepared data as training reads it: memory-mapped Arrow, one sample at a time, and which samples belong to what."""

from __future__ import annotations

import fcntl
import hashlib
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft_api import names
from sft_api.run import ExitCode, Lengths, RunError
from sft_trainer.prepare.samples import unpack_mask
from sft_trainer.prepare.writer import Shard, Summary, committed
from sft_trainer.store import Store

_FRACTION = "spec.validation.fraction"


class Dataset:
    """The samples of one fingerprint. Only their lengths and hashes are held in memory."""

    fingerprint: str
    lengths: NDArray[np.int32]
    """[samples] Tokens."""
    num_loss_tokens: NDArray[np.int32]
    """[samples] Targets; the first token never is one."""
    content: NDArray[np.uint64]
    """[samples] Hash of ids and mask: equal samples, equal hash."""
    summary: Summary

    def __init__(self, summary: Summary, shards: Sequence[Path]):
        """Use `Dataset.open`. `shards`: local files, in the order of the summary."""
        self.summary = summary
        self.fingerprint = summary.fingerprint
        batches = [batch for path in shards for batch in _batches(path)]
        self.lengths = _column(batches, "length", np.int32)
        self.num_loss_tokens = _column(batches, "num_loss_tokens", np.int32)
        self.content = _column(batches, "content", np.uint64)
        self._ids = [batch.column("input_ids") for batch in batches]
        self._masks = [batch.column("loss_mask") for batch in batches]
        self._ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)

    @classmethod
    def open(cls, store: Store, fingerprint: str, cache: Path) -> Dataset:
        """The data prepared as `fingerprint` in `store`: where it lies on file://, else through a copy below `cache`.

        Processes that share `cache` copy once. Raises RunError(DATA) where it is not there or damaged.
        """
        store = store.child(names.prepared(fingerprint).rstrip("/"))
        summary = committed(store)
        if summary is None:
            raise RunError(ExitCode.DATA, f"no prepared data is complete at {store.uri}: run the preparation again.")
        return cls(summary, [_local(store, shard, cache / fingerprint) for shard in summary.shards])

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: SupportsIndex) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids [length], read-only and not copied, and the loss mask [length]: whether a token is a target."""
        place = operator.index(index)
        batch = int(np.searchsorted(self._ends, place, side="right"))
        row = place - (int(self._ends[batch - 1]) if batch else 0)
        ids = self._ids[batch][row].values.to_numpy()
        return ids, unpack_mask(self._masks[batch][row].as_buffer(), len(ids))


def training_samples(dataset: Dataset, fraction: float | None, seed: int, lengths: Lengths) -> NDArray[np.int64]:
    """Indices of the samples trained on, ascending: all but what is held out, and of these a half where asked.

    The shorter half is the first ceil(n/2) by length, then content, then place. `fraction`: as in
    `held_out_samples`; none holds nothing out. Raises RunError(CONFIGURATION) where nothing is left.
    """
    kept = np.arange(len(dataset), dtype=np.int64)
    if fraction is not None:
        kept = kept[~_is_held_out(dataset.content, fraction, seed)]
    if lengths is not Lengths.ALL:
        order = np.lexsort((dataset.content[kept], dataset.lengths[kept]))
        half = (len(kept) + 1) // 2
        kept = np.sort(kept[order[:half] if lengths is Lengths.SHORTER else order[half:]])
    if not len(kept):
        allowed = "Hold out less, or give more data"
        raise RunError(
            ExitCode.CONFIGURATION, f"of {len(dataset)} samples none is left to train on. {allowed}.", _FRACTION
        )
    return kept


def held_out_samples(dataset: Dataset, fraction: float, seed: int) -> NDArray[np.int64]:
    """Indices of the samples held out, ascending, about `fraction` of all.

    A sample's content and the seed decide, so equal samples are held out together, in every data set of the job.
    Raises RunError(CONFIGURATION) where that is none.
    """
    held_out = np.flatnonzero(_is_held_out(dataset.content, fraction, seed)).astype(np.int64)
    if not len(held_out):
        message = (
            f"{fraction:g} of {len(dataset)} samples holds out none: give a larger fraction, "
            "or samples of their own at spec.validation.uri."
        )
        raise RunError(ExitCode.CONFIGURATION, message, _FRACTION)
    return held_out


def _is_held_out(content: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """[samples] Whether a hash of content and seed, uniform in [0, 1), lies below `fraction`."""
    key = int.from_bytes(hashlib.blake2b(b"held out %d" % seed, digest_size=8).digest(), "little")
    mixed = content ^ np.uint64(key)
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of the input sways every bit of the output.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction)


def _batches(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _column(batches: Sequence[pa.RecordBatch], name: str, dtype: type) -> NDArray:  # type: ignore[type-arg]
    return np.concatenate([np.empty(0, dtype), *(batch.column(name).to_numpy() for batch in batches)])


def _local(store: Store, shard: Shard, folder: Path) -> Path:
    """The shard as a local file of the right size and, where it was copied, the right content."""
    in_place = store.local_path(shard.key)
    if in_place is not None:
        if not in_place.is_file() or in_place.stat().st_size != shard.bytes:
            raise _damaged(store, shard)
        return in_place
    path = folder / shard.key
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f"{shard.key}.lock"):
        if not path.is_file() or path.stat().st_size != shard.bytes:
            store.download(shard.key, path)
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    path.unlink()
                    raise _damaged(store, shard)
    return path


def _damaged(store: Store, shard: Shard) -> RunError:
    message = (
        f"the prepared data at {store.uri} is damaged ({shard.key}): delete that folder; it is then prepared again."
    )
    return RunError(ExitCode.DATA, message)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of this machine at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
