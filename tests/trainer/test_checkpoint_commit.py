"""The commit protocol: whatever dies, and whenever, the newest complete checkpoint is whole."""

from __future__ import annotations

import resource
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from sft_api import names
from sft_api.events import CheckpointCommitted
from sft_api.run import ExitCode, RunError
from sft_trainer.checkpoint import list_checkpoints, newest_complete
from sft_trainer.checkpoint.staging import stage
from sft_trainer.store import Store
from sft_trainer.store_errors import Outage
from sft_trainer.store_pace import Pace
from tests.trainer.checkpoints import (
    Faults,
    FaultyStore,
    Gang,
    GatedStore,
    Killed,
    claim,
    make_meta,
    make_pieces,
    make_state,
    read_state,
    same,
)
from tests.trainer.test_store import on_a_full_disk

OLD, NEW = make_state(1), make_state(2)
WORLD = 2


def saved_twice(uri: str, staging: Path, faults: Faults, attempt: int = 1) -> Gang:
    """A gang that has committed step 10; what `faults` does counts from there on."""
    gang = Gang(FaultyStore.over(uri, faults), staging, world=WORLD, attempt=attempt)
    gang.save(OLD, 10)
    faults.done.clear()
    return gang


def operations_of_a_save(uri: str, staging: Path) -> list[str]:
    faults = Faults()
    saved_twice(uri, staging, faults).save(NEW, 20)
    return list(faults.done)


def test_a_save_writes_data_then_manifests_then_the_marker(store_uri: str, tmp_path: Path) -> None:
    done = operations_of_a_save(store_uri, tmp_path / "staging")
    assert sorted(done) == sorted(
        [f"create ckpt/00000020/1/rank-0000{rank}.writer" for rank in range(WORLD)]
        + [f"put ckpt/00000020/1/rank-0000{rank}.safetensors" for rank in range(WORLD)]
        + [f"put ckpt/00000020/1/rank-0000{rank}.manifest.json" for rank in range(WORLD)]
        + ["put ckpt/00000020/1/MANIFEST.json", "create ckpt/00000020/1/COMPLETE"]
    )
    assert done[-2:] == ["put ckpt/00000020/1/MANIFEST.json", "create ckpt/00000020/1/COMPLETE"]
    for rank in range(WORLD):
        mine = [operation.rpartition(".")[2] for operation in done if f"rank-0000{rank}" in operation]
        assert mine == ["writer", "safetensors", "json"]


@pytest.mark.parametrize("fatal", range(2 * 3 + 2))
def test_death_before_any_operation_leaves_the_checkpoint_before(store_uri: str, tmp_path: Path, fatal: int) -> None:
    faults = Faults()
    gang = saved_twice(store_uri, tmp_path / "staging", faults)
    faults.fatal = fatal
    with pytest.raises(Killed):
        gang.save(NEW, 20)
    assert len(faults.done) == fatal

    store = Store.open(store_uri)
    found = newest_complete(store)
    assert found is not None
    assert found.meta.step == 10
    assert same(read_state(found), OLD)

    options = {"resumed_from": 10}
    Gang(store, tmp_path / "staging", world=WORLD, attempt=2, options=options).save(NEW, 20)
    rows = list_checkpoints(store, verify=True)
    assert [(row.step, row.attempt, row.verified) for row in rows] == [(10, 1, True), (20, 2, True)]
    found = newest_complete(store)
    assert found is not None
    assert same(read_state(found), NEW)


def test_death_after_the_marker_leaves_the_new_checkpoint(store_uri: str, tmp_path: Path) -> None:
    faults = Faults()
    gang = saved_twice(store_uri, tmp_path / "staging", faults)
    faults.fatal = 8
    with pytest.raises(Killed):  # the other rank, or the cleaning up, finds itself dead
        gang.save(NEW, 20)
    found = newest_complete(Store.open(store_uri))
    assert found is not None
    assert found.meta.step == 20
    assert same(read_state(found), NEW)


def test_staging_is_the_only_part_that_training_waits_for(store_uri: str, tmp_path: Path) -> None:
    store = GatedStore.over(store_uri)
    gang = Gang(store, tmp_path / "staging")
    live = make_state(3)
    before = make_state(3)
    gang.begin(live, 10)
    assert store.arrived.wait(60)  # the upload has begun, and the gate is shut: `begin` returned all the same
    for arrays in live.values():
        for array in arrays.values():
            array += 1  # training goes on, in place
    assert newest_complete(Store.open(store_uri)) is None
    store.gate.set()
    gang.wait()
    found = newest_complete(Store.open(store_uri))
    assert found is not None
    assert same(read_state(found), before)
    assert list((tmp_path / "staging").rglob("*.safetensors")) == []


def test_one_save_is_in_flight_at_a_time(tmp_path: Path) -> None:
    store = GatedStore.over(f"file://{tmp_path}/x")
    gang = Gang(store, tmp_path / "staging")
    gang.begin(OLD, 10)
    assert store.arrived.wait(60)
    second = threading.Thread(target=gang.begin, args=(NEW, 20))
    second.start()
    store.gate.set()
    second.join()
    gang.wait()
    steps = [key.split("/ckpt/")[1][:8] for key in store.done if "/ckpt/" in key]
    assert steps == sorted(steps)
    assert set(steps) == {"00000010", "00000020"}


def test_a_step_that_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    faults = Faults()
    gang = saved_twice(f"file://{tmp_path}/x", tmp_path / "staging", faults)
    gang.save(OLD, 10)
    assert faults.done == []


def test_what_fails_in_the_background_is_raised_by_the_next_save(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    gang = Gang(Store.open(f"file://{folder}"), tmp_path / "staging")
    (folder / "ckpt").write_text("a file where the folder should be")
    gang.begin(OLD, 10)
    with pytest.raises(RunError, match="A file stands where a folder is needed") as caught:
        gang.begin(NEW, 20)
    assert caught.value.code == ExitCode.STORE_REFUSED
    (folder / "ckpt").unlink()
    gang.save(NEW, 20)
    assert [row.step for row in list_checkpoints(Store.open(f"file://{folder}"), verify=True)] == [20]


def test_two_writers_of_one_attempt_make_one_checkpoint_and_the_other_stops(store_uri: str, tmp_path: Path) -> None:
    store = Store.open(store_uri)
    states = [make_state(1), make_state(2)]
    gangs = [Gang(store, tmp_path / str(number)) for number in range(2)]
    for gang, state in zip(gangs, states, strict=True):
        gang.begin(state, 10)
    failures: list[RunError | None] = []
    for gang in gangs:
        try:
            gang.wait()
        except RunError as failure:
            failures.append(failure)
        else:
            failures.append(None)
    losers = [failure for failure in failures if failure is not None]
    assert len(losers) == 1
    assert losers[0].code == ExitCode.CONFIGURATION
    assert "another writer was first" in losers[0].message
    found = newest_complete(store)
    assert found is not None
    assert same(read_state(found), states[failures.index(None)])


def test_a_marker_that_another_wrote_is_not_ours(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}/x")
    store.put("ckpt/00000010/1/COMPLETE", b"another's")
    with pytest.raises(RunError, match="another writer was first"):
        Gang(store, tmp_path / "staging").save(OLD, 10)
    assert store.get("ckpt/00000010/1/COMPLETE") == b"another's"


class ForgetfulStore(Store):
    """A store whose answer to a successful create is lost: the retry finds the object."""

    def create(self, key: str, data: bytes) -> bool:
        super().create(key, data)
        return super().create(key, data)


def test_a_lost_answer_to_our_own_marker_is_no_defeat(tmp_path: Path) -> None:
    store = ForgetfulStore.open(f"file://{tmp_path}/x")
    Gang(store, tmp_path / "staging").save(OLD, 10)
    assert newest_complete(store) is not None


def test_an_attempt_that_was_overtaken_commits_nothing_more(store_uri: str, tmp_path: Path) -> None:
    store = Store.open(store_uri)
    old = Gang(store, tmp_path / "old")
    old.save(OLD, 10)
    claim(store, 2)
    with pytest.raises(RunError, match="attempt 2 at this run has begun") as caught:
        old.save(NEW, 20)
    assert caught.value.path == "spec.checkpoints.uri"
    found = newest_complete(store)
    assert found is not None
    assert found.meta.step == 10


def test_a_rank_that_never_finishes_is_named(tmp_path: Path) -> None:
    options = {"patience": timedelta(seconds=0.2)}
    gang = Gang(Store.open(f"file://{tmp_path}/x"), tmp_path / "staging", world=3, options=options)
    for rank in (0, 1):
        gang.writers[rank].save(make_pieces(OLD, 3, rank), {}, make_meta(10, 3))
    with pytest.raises(RunError, match=r"ranks \[2\] did not finish uploading step 10") as caught:
        gang.writers[0].wait()
    assert caught.value.code == ExitCode.STORE_UNAVAILABLE
    with pytest.raises(RunError, match="rank 0 did not commit step 10"):
        gang.writers[1].wait()


def test_a_rank_of_another_run_is_not_committed(tmp_path: Path) -> None:
    gang = Gang(Store.open(f"file://{tmp_path}/x"), tmp_path / "staging", world=2)
    for rank, data in enumerate(["d1", "d2"]):
        meta = make_meta(10, 2, fingerprints={"data": data})
        gang.writers[rank].save(make_pieces(OLD, 2, rank), {}, meta)
    with pytest.raises(RunError, match=r"rank-00001\.manifest\.json is not what rank 1 of this run wrote"):
        gang.writers[0].wait()
    assert newest_complete(Store.open(f"file://{tmp_path}/x")) is None


def test_slices_that_do_not_add_up_are_not_committed(tmp_path: Path) -> None:
    gang = Gang(Store.open(f"file://{tmp_path}/x"), tmp_path / "staging")
    gang.writers[0].save(make_pieces(OLD, 2, 0), {}, make_meta(10))
    with pytest.raises(AssertionError, match="do not add up"):
        gang.wait()
    assert newest_complete(Store.open(f"file://{tmp_path}/x")) is None


def test_a_commit_is_reported_after_the_metrics_are_out(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}/x")
    seen: list[str] = []
    events: list[CheckpointCommitted] = []

    def flush() -> None:
        seen.append(f"flush, complete: {store.head('ckpt/00000010/1/COMPLETE') is not None}")

    def on_commit(event: CheckpointCommitted) -> None:
        seen.append(f"commit, complete: {store.head('ckpt/00000010/1/COMPLETE') is not None}")
        events.append(event)

    options = {"before_commit": flush, "on_commit": on_commit}
    Gang(store, tmp_path / "staging", world=2, options=options).save(OLD, 10)
    assert seen == ["flush, complete: False", "commit, complete: True"]
    (event,) = events
    assert (event.step, event.phase) == (10, "skills")
    assert event.uri == f"{store.uri}/{names.checkpoint(10, 1)}".rstrip("/")
    shards = [info for info in store.list("ckpt") if info.key.endswith(".safetensors")]
    assert event.bytes == sum(info.size for info in shards)
    assert event.seconds >= event.stall_seconds > 0


class FailingStore(Store):
    """A store that cannot be reached for so many writes, wherever they come in a save."""

    outages: dict[str, int]

    @classmethod
    def over(cls, uri: str, outages: dict[str, int]) -> FailingStore:
        store = cls.open(uri)
        assert isinstance(store, cls)
        store.outages = outages
        return store

    def put(self, key: str, data: bytes | Path, pace: Pace | None = None) -> None:
        self._fail(key)
        super().put(key, data, pace)

    def create(self, key: str, data: bytes) -> bool:
        created = super().create(key, data)
        self._fail(key)  # the answer is lost
        return created

    def _fail(self, key: str) -> None:
        if self.outages.get(key, 0) > 0:
            self.outages[key] -= 1
            raise Outage(f"writing {key}: SlowDown")


WRITES = ("rank-00001.writer", "rank-00001.safetensors", "rank-00000.manifest.json", "MANIFEST.json", "COMPLETE")


@pytest.mark.parametrize("key", WRITES)
def test_an_outage_costs_time_and_no_checkpoint(store_uri: str, tmp_path: Path, key: str) -> None:
    problems: list[str | None] = []
    store = FailingStore.over(store_uri, {key: 1})
    Gang(store, tmp_path / "staging", world=WORLD, options={"on_problem": problems.append}).save(OLD, 10)
    assert [problem for problem in problems if problem] == [f"writing {key}: SlowDown"]
    assert problems[-1] is None
    assert [row.verified for row in list_checkpoints(Store.open(store_uri), verify=True)] == [True]


def test_an_outage_that_does_not_end_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_STORE_RETRY_SECONDS", "0.2")  # of a request; a save is tried six times as long
    problems: list[str | None] = []
    store = FailingStore.over(f"file://{tmp_path}/x", {"MANIFEST.json": 1000})
    gang = Gang(store, tmp_path / "staging", options={"on_problem": problems.append})
    with pytest.raises(RunError, match=r"writing MANIFEST\.json: SlowDown") as caught:
        gang.save(OLD, 10)
    assert caught.value.code == ExitCode.STORE_UNAVAILABLE
    assert problems[-1] == "writing MANIFEST.json: SlowDown"
    assert gang.writers[0].committed_step is None


class ForgettingStore(Store):
    """A store that says yes and keeps something else."""

    def put(self, key: str, data: bytes | Path, pace: Pace | None = None) -> None:
        if isinstance(data, Path):
            data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
        super().put(key, data, pace)


def test_what_reads_back_otherwise_than_it_was_written_is_not_committed(store_uri: str, tmp_path: Path) -> None:
    gang = Gang(ForgettingStore.open(store_uri), tmp_path / "staging")
    with pytest.raises(RunError, match=r"rank-00000\.safetensors has another checksum than when it was") as caught:
        gang.save(OLD, 10)
    assert caught.value.code == ExitCode.STORE_UNAVAILABLE
    assert newest_complete(Store.open(store_uri)) is None


def test_every_rank_knows_what_is_committed(tmp_path: Path) -> None:
    gang = Gang(Store.open(f"file://{tmp_path}/x"), tmp_path / "staging", world=3, options={"resumed_from": 4})
    assert [writer.committed_step for writer in gang.writers] == [4, 4, 4]
    gang.save(OLD, 10)
    assert [writer.committed_step for writer in gang.writers] == [10, 10, 10]


def test_closing_leaves_nothing_staged(tmp_path: Path) -> None:
    gang = Gang(Store.open(f"file://{tmp_path}/x"), tmp_path / "staging")
    gang.save(OLD, 10)
    for writer in gang.writers:
        writer.close()
    assert list((tmp_path / "staging").iterdir()) == []


FULL_DISK = """
import sys
from pathlib import Path
import numpy as np
from sft_api.run import RunError
from sft_trainer.checkpoint.staging import stage
from tests.trainer.checkpoints import ArrayPiece
staging = Path(sys.argv[1])
def piece(count):
    return ArrayPiece("w", (count,), 0, {"master": np.ones(count, np.float32)})
print(stage(staging / "small", [piece(1000)], {}))
try:
    stage(staging / "large", [piece(1 << 20)], {})
except RunError as error:
    print(int(error.code), error.message)
(staging / "ballast").write_bytes(bytes(900 << 10))
try:
    stage(staging / "medium", [piece(100_000)], {})
except RunError as error:
    print(int(error.code), error.message)
print(sorted(path.name for path in staging.iterdir()))
"""


def test_a_full_staging_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    output = on_a_full_disk(tmp_path, FULL_DISK)
    assert output.count("13 staging a checkpoint needs") == 2
    assert "Nothing of this checkpoint was committed" in output
    assert "['ballast', 'small']" in output


def test_staging_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match="File too large") as caught:
            stage(tmp_path / "staged", make_pieces(OLD), {"rng": bytes(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == ExitCode.STORE_REFUSED
    assert list(tmp_path.iterdir()) == []


def test_live_state_that_is_not_fp32_is_our_own_mistake(tmp_path: Path) -> None:
    gang = Gang(Store.open(f"file://{tmp_path}/x"), tmp_path / "staging")
    pieces = make_pieces(OLD)
    pieces[0].tensors = {"master": np.ones(44, np.float64)}
    with pytest.raises(AssertionError, match="float64"):
        gang.writers[0].save(pieces, {}, make_meta(10))
