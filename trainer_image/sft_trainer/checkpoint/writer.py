"""Saving: stage while training waits, then upload and commit in the background, one save in flight."""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from sft_api import names
from sft_api.events import CheckpointCommitted
from sft_api.run import ExitCode, RunError
from sft_api.spec import Keep
from sft_trainer.checkpoint.attempts import check_not_superseded
from sft_trainer.checkpoint.catalog import committed
from sft_trainer.checkpoint.commit import Place, await_commit, commit, upload_rank
from sft_trainer.checkpoint.records import CheckpointMeta, Manifest, shard_file
from sft_trainer.checkpoint.retention import Committed, Lineage, delete_checkpoint, leftovers, surplus
from sft_trainer.checkpoint.shards import Piece
from sft_trainer.checkpoint.staging import stage
from sft_trainer.store import Retry, Store
from sft_trainer.store_errors import Outage
from sft_trainer.store_pace import Pace

_Result = TypeVar("_Result")


def _nothing() -> None:
    return


def _nobody(_: object) -> None:
    return


_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
"""Between tries at a store that does not answer."""
OUTAGE_RETRIES = 6
"""How many times as long as a single request an upload in the background is tried: training goes on meanwhile."""


@dataclass(frozen=True)
class _Save:
    """One save on its way: what was staged, and when and how long training stood still for it."""

    meta: CheckpointMeta
    staged: Path
    started: float
    stall_seconds: float
    pace: Pace | None
    """How fast it may go, until training waits for it."""


class CheckpointWriter:
    """One rank's hand in the checkpoints of a run. Every rank has one and saves at the same steps.

    `save` blocks for staging alone. A store that does not answer is tried again for a while; what fails for good in the
    background is raised by the next `save` or `wait`.
    """

    def __init__(
        self,
        store: Store,
        *,
        attempt: int,
        rank: int,
        world: int,
        staging: Path,
        keep: Callable[[], Keep],
        resumed_from: int | None = None,
        before_commit: Callable[[], None] = _nothing,
        on_commit: Callable[[CheckpointCommitted], None] = _nobody,
        on_problem: Callable[[str | None], None] = _nobody,
        patience: timedelta = timedelta(minutes=30),
        bytes_per_second: float | None = None,
        warn: Callable[[str], None] = _nobody,
    ):
        """`store`: at checkpoints.uri. `staging`: a local folder of this attempt, emptied of this rank's files.

        `keep`: asked after each commit, for it may change. `resumed_from`: step of the checkpoint that this attempt
        went on from. `before_commit` and `on_commit` are called on rank 0, `on_problem` on every rank with what keeps
        its save from going on, and None when it goes on; all in the background thread. `patience`: how long to wait
        for other ranks' uploads. `bytes_per_second`: how fast this rank uploads while training goes on.
        `warn`: told in the background thread of what went wrong and does no harm.
        """
        self._store, self._attempt, self._rank, self._world = store, attempt, rank, world
        self._keep = keep
        self._lineage = Lineage(attempt, resumed_from)
        self._staging = staging / f"rank-{rank:05d}"
        self._before_commit, self._on_commit, self._patience = before_commit, on_commit, patience
        self._on_problem = on_problem
        self._bytes_per_second, self._warn = bytes_per_second, warn
        self._outage_seconds = OUTAGE_RETRIES * Retry.from_environment().seconds
        self._name = uuid.uuid4().hex
        self.committed_step = resumed_from
        """Step of the newest checkpoint that this rank knows to be committed."""
        self._in_flight: threading.Thread | None = None
        self._pace: Pace | None = None
        self._failure: BaseException | None = None
        self._newest_step: int | None = None
        self._has_ended_uploads = False
        shutil.rmtree(self._staging, ignore_errors=True)

    def save(
        self, pieces: Iterable[Piece], rank_state: Mapping[str, bytes], meta: CheckpointMeta, waited: float = 0.0
    ) -> float:
        """Stage what this rank owns and begin its upload; seconds that the caller was held up, with those `waited`.

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
        stall_seconds = waited + time.perf_counter() - clock
        self._pace = Pace(self._bytes_per_second) if self._bytes_per_second else None
        save = _Save(meta, staged, started, stall_seconds, self._pace)
        self._in_flight = threading.Thread(target=self._finish, args=(save,), name="checkpoint", daemon=True)
        self._in_flight.start()
        return stall_seconds

    def has_settled(self, seconds: float) -> bool:
        """Whether, within so many seconds, no save is on its way any more; now that somebody waits, without a limit."""
        if self._pace is not None:
            self._pace.lift()
        if self._in_flight is not None:
            self._in_flight.join(seconds)
        return self._in_flight is None or not self._in_flight.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What kept the newest save from being committed, until it is raised."""
        return self._failure

    def wait(self) -> None:
        """Return when the newest save is committed, by all ranks; raise what kept it from being so."""
        if self._in_flight is not None:
            self.has_settled(threading.TIMEOUT_MAX)
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
            self._failure = self._cause(error)
            self._on_problem(str(self._failure))
        finally:
            save.staged.unlink(missing_ok=True)

    def _cause(self, error: BaseException) -> BaseException:
        """Why a save failed: a later attempt cleans up after this one, and then anything may be missing."""
        if isinstance(error, Outage) or not isinstance(error, Exception):
            return error  # a store that is away cannot be asked
        try:
            check_not_superseded(self._store, self._attempt)
        except RunError as cause:
            return cause if cause.code is ExitCode.CONFIGURATION else error
        return error

    def _upload_and_commit(self, save: _Save) -> None:
        folder = self._store.child(names.checkpoint(save.meta.step, self._attempt))
        place = Place(folder, self._attempt, self._rank, self._name, self._patience)
        self._ride_out(lambda: upload_rank(place, save.staged, save.meta, save.pace))
        if self._rank != 0:
            self._ride_out(lambda: await_commit(place, save.meta))
            self.committed_step = save.meta.step
            return
        manifest = self._ride_out(lambda: commit(place, save.meta, self._before_commit_check))
        self.committed_step = save.meta.step
        self._report(folder, manifest, save)
        self._ride_out(lambda: self._clean_up(manifest))
        self._end_uploads()

    def _ride_out(self, work: Callable[[], _Result]) -> _Result:
        """Do `work`, again from its beginning after an outage of the store, until one has lasted too long."""
        deadline, pause = time.monotonic() + self._outage_seconds, _FIRST_PAUSE_SECONDS
        while True:
            try:
                result = work()
            except Outage as outage:
                if time.monotonic() + pause > deadline:
                    raise
                self._on_problem(str(outage))
            else:
                self._on_problem(None)
                return result
            threading.Event().wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

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
        for old in surplus([*committed(self._store), newest], self._keep(), self._lineage, newest):
            delete_checkpoint(self._store, old.step, old.attempt)
        for step, attempt in leftovers(self._store, self._lineage, newest):
            delete_checkpoint(self._store, step, attempt)

    def _end_uploads(self) -> None:
        """Free what dead attempts had uploaded of objects that they did not finish, once in this attempt's life."""
        if self._has_ended_uploads:
            return
        self._has_ended_uploads = True
        try:
            if began := self._store.head(names.attempt(self._attempt)):
                for prefix in (names.CHECKPOINTS, names.EXPORTS):
                    self._store.end_uploads(prefix, began.modified)
        except RunError as error:
            self._warn(f"uploads that dead attempts left unfinished stay in the bucket: {error}")
