"""Saving: stage while training waits, then upload and commit in the background, one save in flight."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sft_api import names
from sft_api.events import CheckpointCommitted
from sft_api.spec import Keep
from sft_trainer.checkpoint.attempts import check_not_superseded
from sft_trainer.checkpoint.catalog import committed
from sft_trainer.checkpoint.commit import Place, await_commit, commit, upload_rank
from sft_trainer.checkpoint.records import CheckpointMeta, Manifest, shard_file
from sft_trainer.checkpoint.retention import Committed, Lineage, delete_checkpoint, leftovers, surplus
from sft_trainer.checkpoint.shards import Piece
from sft_trainer.checkpoint.staging import stage
from sft_trainer.store import Store


def _nothing() -> None:
    return


def _nobody(_: CheckpointCommitted) -> None:
    return


@dataclass(frozen=True)
class _Save:
    """One save on its way: what was staged, and when and how long training stood still for it."""

    meta: CheckpointMeta
    staged: Path
    started: float
    stall_seconds: float


class CheckpointWriter:
    """One rank's hand in the checkpoints of a run. Every rank has one and saves at the same steps.

    `save` blocks for staging alone. What fails in the background is raised by the next `save` or `wait`.
    """

    def __init__(
        self,
        store: Store,
        *,
        attempt: int,
        rank: int,
        world: int,
        staging: Path,
        keep: Keep,
        resumed_from: int | None = None,
        before_commit: Callable[[], None] = _nothing,
        on_commit: Callable[[CheckpointCommitted], None] = _nobody,
        patience: timedelta = timedelta(minutes=30),
    ):
        """`store`: at checkpoints.uri. `staging`: a local folder of this attempt, emptied of this rank's files.

        `resumed_from`: step of the checkpoint that this attempt went on from. `before_commit` and `on_commit` are
        called on rank 0, in the background thread. `patience`: how long to wait for other ranks' uploads.
        """
        self._store, self._attempt, self._rank, self._world = store, attempt, rank, world
        self._keep = keep
        self._lineage = Lineage(attempt, resumed_from)
        self._staging = staging / f"rank-{rank:05d}"
        self._before_commit, self._on_commit, self._patience = before_commit, on_commit, patience
        self._in_flight: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._newest_step: int | None = None
        shutil.rmtree(self._staging, ignore_errors=True)

    def save(self, pieces: Iterable[Piece], rank_state: Mapping[str, bytes], meta: CheckpointMeta) -> float:
        """Stage what this rank owns and begin its upload; seconds that the caller was held up.

        Waits first for the save before, if that is still on its way. A step that is saved already is not saved again.
        `rank_state` is given back to the same rank by `Checkpoint.rank_state`.
        """
        assert meta.world_size == self._world, (meta.world_size, self._world)
        started, clock = time.time(), time.perf_counter()
        if meta.step == self._newest_step:
            return 0.0
        self.wait()
        staged = self._staging / f"{meta.step:08d}-{shard_file(self._rank)}"
        stage(staged, list(pieces), rank_state)
        self._newest_step = meta.step
        stall_seconds = time.perf_counter() - clock
        save = _Save(meta, staged, started, stall_seconds)
        self._in_flight = threading.Thread(target=self._finish, args=(save,), name="checkpoint", daemon=True)
        self._in_flight.start()
        return stall_seconds

    def wait(self) -> None:
        """Return when the newest save is committed, by all ranks; raise what kept it from being so."""
        if self._in_flight is not None:
            self._in_flight.join()
            self._in_flight = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait for what is on its way, and remove the staging folder."""
        try:
            self.wait()
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _finish(self, save: _Save) -> None:
        try:
            self._upload_and_commit(save)
        except BaseException as error:  # raised again on the training thread
            self._failure = error
        finally:
            save.staged.unlink(missing_ok=True)

    def _upload_and_commit(self, save: _Save) -> None:
        folder = self._store.child(names.checkpoint(save.meta.step, self._attempt))
        place = Place(folder, self._attempt, self._rank, self._patience)
        upload_rank(place, save.staged, save.meta)
        if self._rank != 0:
            await_commit(place, save.meta)
            return
        manifest = commit(place, save.meta, self._before_commit_check)
        self._report(folder, manifest, save)
        self._clean_up(manifest)

    def _before_commit_check(self) -> None:
        self._before_commit()
        check_not_superseded(self._store, self._attempt)

    def _report(self, folder: Store, manifest: Manifest, save: _Save) -> None:
        now = time.time()
        self._on_commit(
            CheckpointCommitted(
                step=save.meta.step,
                phase=save.meta.phase,
                uri=folder.uri,
                bytes=sum(shard.size for shard in manifest.shards),
                seconds=now - save.started,
                stall_seconds=save.stall_seconds,
                time=now,
            )
        )

    def _clean_up(self, manifest: Manifest) -> None:
        """Retention, and what dead attempts left behind."""
        meta = manifest.meta
        newest = Committed(meta.step, manifest.attempt, meta.phase_end, meta.validation_loss)
        for old in surplus([*committed(self._store), newest], self._keep, self._lineage, newest):
            delete_checkpoint(self._store, old.step, old.attempt)
        for step, attempt in leftovers(self._store, self._lineage, newest):
            delete_checkpoint(self._store, step, attempt)
