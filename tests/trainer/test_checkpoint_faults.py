"""kill -9 at every instant of a save, and all that a store over HTTP may do: nothing half is ever taken for whole."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos.gateway import Gateway, Misbehaviour
from sft_api.run import ExitCode, RunError
from sft_api.spec import Keep
from sft_trainer.checkpoint import list_checkpoints, newest_complete
from sft_trainer.store import Retry, Store
from sft_trainer.store_pace import Pace
from sft_trainer.store_uploads import Bucket, Upload
from tests.s3 import S3Server
from tests.trainer.checkpoints import KEYS, ArrayPiece, Gang, make_meta, make_state, read_state, same, take_number_later

OLD, NEW = make_state(1), make_state(2)
WORLD = 2
PART_BYTES = 5 << 20
"""S3's smallest: a shard of a few megabytes goes up in several."""
COUNT = PART_BYTES * 3 // 2 // (4 * len(KEYS))
"""Elements that a rank holds: a part and a half."""
Start = multiprocessing.get_context("forkserver")
Start.set_forkserver_preload([__name__])


class MortalStore(Store):
    """A store whose process kills itself at an instant: before a write, or between a file's blocks."""

    fatal: int
    instants: Iterator[int]

    @classmethod
    def over(cls, uri: str, fatal: int) -> MortalStore:
        store = cls.open(uri)
        assert isinstance(store, cls)
        store.fatal, store.instants = fatal, itertools.count(1)
        return store

    def put(self, key: str, data: bytes | Path, pace: Pace | None = None) -> None:
        self.live_on()
        super().put(key, data, MortalPace(self))

    def create(self, key: str, data: bytes) -> bool:
        self.live_on()
        return super().create(key, data)

    def delete(self, keys: object) -> None:
        self.live_on()
        super().delete(keys)  # type: ignore[arg-type]

    def live_on(self) -> None:
        if next(self.instants) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalPace(Pace):
    """No limit, small parts, and death between blocks."""

    def __init__(self, store: MortalStore):
        super().__init__(1e12)
        self.store = store

    def part_bytes(self, size: int, most: int) -> int:
        return PART_BYTES

    def read(self, path: Path) -> Iterator[bytes]:
        for block in super().read(path):
            self.store.live_on()
            yield block


def save_large(store: Store, staging: Path, attempt: int, step: int) -> None:
    """A whole save of shards that are larger than a part, keeping nothing older."""
    gang = Gang(store, staging, WORLD, attempt, Keep(last=1), {"resumed_from": 10})
    for rank, writer in enumerate(gang.writers):
        tensors = {key: np.full(COUNT, step, np.float32) for key in KEYS}
        piece = ArrayPiece("w", (WORLD * COUNT,), rank * COUNT, tensors)
        writer.save([piece], {}, make_meta(step, WORLD))
    gang.wait()


def live_and_die(uri: str, environment: Mapping[str, str], staging: Path, fatal: int) -> None:
    """What the process does that is killed: a second attempt saves step 20. `fatal` 0: it is killed from outside."""
    os.environ.update(environment)
    save_large(MortalStore.over(uri, fatal), staging, attempt=2, step=20)


def check_what_is_left(store: Store, staging: Path) -> int:
    """Step of the newest checkpoint, which is whole like all that are complete; then a third attempt goes through."""
    rows = list_checkpoints(store, verify=True)
    assert all(row.verified for row in rows if row.complete), rows
    found = newest_complete(store)
    assert found is not None
    step = found.meta.step
    if step == 10:
        assert same(read_state(found), OLD)
    else:
        assert np.array_equal(found.read("w", "exp_avg", 0, WORLD * COUNT), np.full(WORLD * COUNT, 20, np.float32))
    save_large(store, staging, attempt=3, step=30)
    assert [(row.step, row.attempt, row.verified) for row in list_checkpoints(store, verify=True)] == [(30, 3, True)]
    return step


def test_kill_9_at_any_instant_on_disk(tmp_path: Path) -> None:
    newest = []
    for fatal in itertools.count(1):
        store, staging = Store.open(f"file://{tmp_path}/{fatal}"), tmp_path / "staging"
        Gang(store, staging).save(OLD, 10)
        process = Start.Process(target=live_and_die, args=(store.uri, {}, staging, fatal))
        process.start()
        process.join()
        newest.append(check_what_is_left(store, staging))
        left = [path.name for path in (tmp_path / str(fatal)).rglob("*") if "#" in path.name]
        assert left == []  # what LocalStore was writing
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert newest == sorted(newest)
    assert set(newest) == {10, 20}


@pytest.fixture
def gateway(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """In front of the server; whoever opens a store now does so through it."""
    gateway = Gateway(s3_server.endpoint)
    gateway.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", gateway.endpoint)
    yield gateway
    gateway.stop()


def test_kill_9_at_any_request_to_s3(
    gateway: Gateway, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, between and after the parts of shards, manifests, markers and deletions: one write gets no answer."""
    bucket, staging = s3_server.new_bucket(), tmp_path / "staging"
    through_gateway = {**s3_server.environment, "AWS_ENDPOINT_URL": gateway.endpoint}
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    newest, unfinished = [], []
    for fatal in itertools.count(1):
        store = Store.open(f"{bucket}/{fatal}")
        Gang(store, staging).save(OLD, 10)
        process = Start.Process(target=live_and_die, args=(store.uri, through_gateway, staging, 0))

        def kill(number: int, process: ForkServerProcess = process, fatal: int = fatal) -> None:
            if number == fatal:
                process.kill()

        gateway.begin()
        gateway.on_write = kill
        process.start()
        process.join()
        unfinished.append(len(uploads(store)))
        take_number_later(store, s3_server, 3, seconds=10)
        newest.append(check_what_is_left(store, staging))
        assert uploads(store) == []
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert newest == sorted(newest)
    assert set(newest) == {10, 20}
    assert max(unfinished) == WORLD


def uploads(store: Store) -> list[Upload]:
    name, _, prefix = store.uri.removeprefix("s3://").partition("/")
    bucket = Bucket.of(name, os.environ)
    assert bucket is not None
    return bucket.uploads(f"{prefix}/")


PASSING = {
    "500": Misbehaviour(500),
    "503 slow down": Misbehaviour(503, "SlowDown"),
    "connections cut": Misbehaviour(),
    "answers lost": Misbehaviour(lose_the_answer=True),
    "no answer in time": Misbehaviour(500, after_seconds=1.0),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_ridden_out_wherever_it_strikes(
    fault: str, gateway: Gateway, s3_server: S3Server, tmp_path: Path
) -> None:
    bucket = s3_server.new_bucket()
    for first in itertools.count(1):
        store = Store.open(f"{bucket}/{first}", retry=Retry(seconds=30, request_seconds=0.5))

        def strike(number: int, first: int = first) -> None:
            if number == first:
                gateway.misbehave(PASSING[fault], times=2)

        gateway.begin()
        gateway.on_write = strike
        store.check_writable()
        gang = Gang(store, tmp_path / "staging", WORLD)
        gang.save(NEW, 20)
        assert [(row.step, row.verified) for row in list_checkpoints(store, verify=True)] == [(20, True)]
        if gateway.writes < first:
            break


LASTING = {
    "a bucket that turned read-only": (
        Misbehaviour(403, "AccessDenied", writes_only=True),
        "the credentials need to read, write, list and delete",
    ),
    "credentials that have expired": (Misbehaviour(403, "ExpiredToken"), "are wrong or have expired"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_does_not_pass_is_told_in_the_buckets_own_words_and_harms_nothing(
    fault: str, gateway: Gateway, s3_bucket: str, tmp_path: Path
) -> None:
    how, advice = LASTING[fault]
    store = Store.open(f"{s3_bucket}/x", retry=Retry(seconds=30, request_seconds=5))
    gang = Gang(store, tmp_path / "staging", WORLD)
    gang.save(OLD, 10)
    gateway.misbehave(how, times=1000)
    with pytest.raises(RunError) as caught:
        gang.save(NEW, 20)
    assert caught.value.code == ExitCode.STORE_REFUSED
    assert how.code in caught.value.message
    assert advice in caught.value.message
    gateway.begin()
    found = newest_complete(store)
    assert found is not None
    assert same(read_state(found), OLD)
