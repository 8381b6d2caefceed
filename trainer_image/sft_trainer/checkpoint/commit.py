"""The commit protocol, after staging. Until the last line nothing is visible as complete; after it, everything is.

each rank    takes its place by conditional create          of two writers with one attempt number one goes on
             shard, read back, then its manifest            each durable before the next
rank 0       waits until it sees every rank's manifest      by polling the store: no collective off the main thread
             MANIFEST.json, durable
             COMPLETE, by conditional create

Both parts may be done again from their beginning, should the store fail in the middle of one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import TypeVar

from pydantic import ValidationError

from sft_api import names
from sft_api.run import ExitCode, RunError
from sft_trainer.checkpoint.digest import ParametersDigest, digest_slice
from sft_trainer.checkpoint.reader import what_is_wrong
from sft_trainer.checkpoint.records import (
    CheckpointMeta,
    FileRecord,
    Manifest,
    Marker,
    RankManifest,
    rank_manifest_file,
    shard_file,
    writer_file,
)
from sft_trainer.checkpoint.shards import masters
from sft_trainer.store import Store
from sft_trainer.store_pace import Pace

_SLOWEST_POLL_SECONDS = 2.0
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Place:
    """Who writes which checkpoint. `folder`: the store at the checkpoint's own prefix."""

    folder: Store
    attempt: int
    rank: int
    writer: str
    """Random: by it a writer knows what it has written itself."""
    patience: timedelta
    """How long to wait for the other ranks' uploads."""


def upload_rank(place: Place, staged: Path, meta: CheckpointMeta, pace: Pace | None = None) -> RankManifest:
    """Upload a staged shard, at `pace`, read it back, then say so in the rank's manifest."""
    _take_place(place, meta)
    file = shard_file(place.rank)
    digest, coverage = _survey(staged)
    manifest = RankManifest(
        step=meta.step,
        attempt=place.attempt,
        rank=place.rank,
        world_size=meta.world_size,
        fingerprints=meta.fingerprints,
        shard=FileRecord(file=file, size=staged.stat().st_size, sha256=_sha256(staged)),
        parameters_digest=str(digest),
        coverage=coverage,
    )
    place.folder.put(file, staged, pace)
    place.folder.make_durable([file])
    if problem := what_is_wrong(place.folder, manifest.shard):
        raise RunError(ExitCode.STORE_UNAVAILABLE, f"{problem}, a moment ago; step {meta.step} is not committed")
    place.folder.put(rank_manifest_file(place.rank), _json(manifest))
    place.folder.make_durable([rank_manifest_file(place.rank)])
    return manifest


def commit(place: Place, meta: CheckpointMeta, before: Callable[[], None]) -> Manifest:
    """On rank 0: wait for all ranks, then make the checkpoint complete. `before` is called just before it is.

    Raises RunError where a rank's upload is missing or wrong, and where another writer has committed it.
    """
    ranks = _await_ranks(place, meta)
    manifest = Manifest(
        attempt=place.attempt,
        meta=meta,
        shards=[rank.shard for rank in ranks],
        parameters=_check_coverage(ranks),
        parameters_digest=str(sum((ParametersDigest.parse(r.parameters_digest) for r in ranks), ParametersDigest())),
    )
    body = _json(manifest)
    place.folder.put(names.MANIFEST, body)
    place.folder.make_durable([names.MANIFEST])
    before()
    marker = Marker(
        step=meta.step,
        attempt=place.attempt,
        manifest_sha256=hashlib.sha256(body).hexdigest(),
        writer=place.writer,
        time=time.time(),
    )
    if not place.folder.create(names.COMPLETE, _json(marker)) and not _is_our_marker(place):
        raise _beaten(place, meta)
    place.folder.make_durable([names.COMPLETE])
    return manifest


def await_commit(place: Place, meta: CheckpointMeta) -> None:
    """On the other ranks: return when rank 0 has committed."""
    _poll(place, lambda: place.folder.head(names.COMPLETE), f"rank 0 did not commit step {meta.step}")


def _await_ranks(place: Place, meta: CheckpointMeta) -> list[RankManifest]:
    expected = {rank_manifest_file(rank): rank for rank in range(meta.world_size)}
    missing: list[int] = []

    def sizes() -> dict[str, int] | None:
        seen = {info.key: info.size for info in place.folder.list()}
        missing[:] = [rank for file, rank in expected.items() if file not in seen]
        return None if missing else seen

    seen = _poll(place, sizes, lambda: f"ranks {missing} did not finish uploading step {meta.step}")
    ranks = [RankManifest.model_validate_json(place.folder.get(file)) for file in expected]
    for number, rank in enumerate(ranks):
        given = (rank.step, rank.attempt, rank.rank, rank.world_size, rank.fingerprints)
        due = (meta.step, place.attempt, number, meta.world_size, meta.fingerprints)
        size = seen.get(rank.shard.file)
        if given != due or size != rank.shard.size:
            raise RunError(
                ExitCode.STORE_UNAVAILABLE,
                f"{place.folder.uri}/{rank_manifest_file(number)} is not what rank {number} of this run wrote, or its "
                f"shard has {size} bytes instead of {rank.shard.size}: another run writes there. Step {meta.step} is "
                "not committed",
                "spec.checkpoints.uri",
            )
    return ranks


def _poll(place: Place, look: Callable[[], _Found | None], complaint: str | Callable[[], str]) -> _Found:
    """What `look` finds, asking again with growing pauses until the patience is at an end."""
    deadline, pause = time.monotonic() + place.patience.total_seconds(), 0.02
    while (found := look()) is None:
        if time.monotonic() >= deadline:
            said = complaint if isinstance(complaint, str) else complaint()
            waited = f"within {place.patience.total_seconds():.0f} s"
            raise RunError(ExitCode.STORE_UNAVAILABLE, f"{said} {waited}; it is not committed at {place.folder.uri}")
        Event().wait(pause)
        pause = min(2 * pause, _SLOWEST_POLL_SECONDS)
    return found


def _check_coverage(ranks: list[RankManifest]) -> int:
    """Elements of all parameters. The ranks' slices must add up to each parameter: else the engine left some out."""
    held: dict[str, int] = {}
    totals: dict[str, int] = {}
    for rank in ranks:
        for name, (count, total) in rank.coverage.items():
            held[name] = held.get(name, 0) + count
            totals[name] = total
    wrong = [f"{name}: {held[name]} of {total}" for name, total in totals.items() if held[name] != total]
    assert not wrong, f"the ranks' slices do not add up: {wrong[:5]}"
    return sum(totals.values())


def _take_place(place: Place, meta: CheckpointMeta) -> None:
    # Else the slower of two writers would put its shard over the one that the faster has committed.
    file, ours = writer_file(place.rank), place.writer.encode()
    # Where the answer to our own create was lost, we find what we wrote.
    if not place.folder.create(file, ours) and place.folder.get(file) != ours:
        raise _beaten(place, meta)


def _is_our_marker(place: Place) -> bool:
    try:
        return Marker.model_validate_json(place.folder.get(names.COMPLETE)).writer == place.writer
    except ValidationError:
        return False


def _beaten(place: Place, meta: CheckpointMeta) -> RunError:
    return RunError(
        ExitCode.CONFIGURATION,
        f"another writer was first at {place.folder.uri}: two runs with attempt number {place.attempt} save step "
        f"{meta.step} to one place. This one stops; run one at a time, or give each run its own checkpoints.uri",
        "spec.checkpoints.uri",
    )


def _survey(staged: Path) -> tuple[ParametersDigest, Mapping[str, tuple[int, int]]]:
    digest, coverage = ParametersDigest(), {}
    for piece, values in masters(staged):
        digest += digest_slice(piece.name, piece.shape, piece.start, values)
        coverage[piece.name] = (piece.count, piece.total)
    return digest, coverage


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(record: RankManifest | Manifest | Marker) -> bytes:
    return record.model_dump_json(by_alias=True, indent=1).encode()
