"""Which checkpoints stay: a table, and the order in which the others go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_api import names
from sft_api.run import ExitCode, RunError
from sft_api.spec import Keep
from sft_trainer.checkpoint import list_checkpoints, newest_complete
from sft_trainer.checkpoint.retention import Committed, Lineage, surplus
from sft_trainer.store import Store
from sft_trainer.store_pace import Pace
from tests.trainer.checkpoints import Faults, FaultyStore, Gang, Killed, make_state


def kept(complete: list[Committed], keep: Keep, attempt: int = 1, resumed_from: int | None = None) -> list[int]:
    newest = max(c for c in complete if c.attempt == attempt)
    gone = surplus(complete, keep, Lineage(attempt, resumed_from), newest)
    assert newest not in gone
    return [c.step for c in sorted(complete) if c not in gone]


def steps(*numbers: int, ends: tuple[int, ...] = (), losses: dict[int, float] | None = None) -> list[Committed]:
    return [Committed(n, 1, n in ends, (losses or {}).get(n)) for n in numbers]


LOSSES = {1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0}


@pytest.mark.parametrize(
    ("complete", "keep", "expected"),
    [
        (steps(1), Keep(last=1), [1]),
        (steps(1, 2, 3), Keep(last=2), [2, 3]),
        (steps(1, 2, 3), Keep(last=9), [1, 2, 3]),
        (steps(1, 2, 3, 4, ends=(2,)), Keep(last=1), [2, 4]),
        (steps(1, 2, 3, 4, ends=(2,)), Keep(last=1, phase_ends=False), [4]),
        (steps(1, 2, 3, 4, losses=LOSSES), Keep(last=1, best=1), [2, 4]),
        (steps(1, 2, 3, 4, losses=LOSSES), Keep(last=1, best=2), [2, 3, 4]),
        (steps(1, 2, 3, 4, losses={1: 1.0}), Keep(last=1, best=2), [1, 4]),
        (steps(1, 2, 3, 4, 5, ends=(1,), losses=LOSSES), Keep(last=2, best=1), [1, 2, 4, 5]),
    ],
    ids=[
        "the only one",
        "last 2",
        "fewer than asked",
        "phase ends",
        "no phase ends",
        "best",
        "best 2",
        "unscored",
        "all",
    ],
)
def test_what_keep_asks_for_stays(complete: list[Committed], keep: Keep, expected: list[int]) -> None:
    assert kept(complete, keep) == expected


def test_what_the_present_state_does_not_descend_from_pushes_nothing_out() -> None:
    """Attempt 1 committed 10, 20 and a damaged 30; attempt 2 went on from 20 and has just committed 35."""
    complete = [Committed(10, 1), Committed(20, 1), Committed(30, 1), Committed(35, 2)]
    assert kept(complete, Keep(last=2), attempt=2, resumed_from=20) == [20, 35]


def test_what_lies_ahead_is_left_alone_until_it_is_passed() -> None:
    complete = [Committed(20, 1), Committed(30, 1), Committed(25, 2)]
    assert kept(complete, Keep(last=2), attempt=2, resumed_from=20) == [20, 25, 30]


def test_of_two_attempts_at_one_step_the_later_stays() -> None:
    complete = [Committed(20, 1), Committed(30, 1), Committed(30, 2)]
    gone = surplus(complete, Keep(last=5), Lineage(2, 20), Committed(30, 2))
    assert gone == [Committed(30, 1)]


def test_a_later_attempts_checkpoints_are_not_touched() -> None:
    complete = [Committed(10, 3), Committed(20, 3), Committed(30, 1)]
    assert kept(complete, Keep(last=1), attempt=1) == [10, 20, 30]


def complete_steps(store: Store) -> list[int]:
    return [row.step for row in list_checkpoints(store, verify=False) if row.complete]


def test_a_run_keeps_what_it_was_told_to(store_uri: str, tmp_path: Path) -> None:
    store = Store.open(store_uri)
    gang = Gang(store, tmp_path / "staging", world=2, keep=Keep(last=2))
    for step in range(1, 7):
        gang.save(make_state(step), step, phase_end=step == 2)
    assert complete_steps(store) == [2, 5, 6]
    assert store.folders(names.CHECKPOINTS) == [names.checkpoint(step, 1)[:-3] for step in (2, 5, 6)]


def test_the_marker_goes_before_the_data(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/x"
    faults = Faults()
    gang = Gang(FaultyStore.over(uri, faults), tmp_path / "staging", keep=Keep(last=1))
    gang.save(make_state(1), 1)
    gang.save(make_state(2), 2)
    deletions = [operation for operation in faults.done if operation.startswith("delete")]
    assert deletions[0] == "delete ckpt/00000001/1/COMPLETE"
    assert "rank-00000.safetensors" in deletions[1]


def test_a_deletion_that_was_cut_off_is_finished_by_the_next_save(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/x"
    Gang(Store.open(uri), tmp_path / "staging", keep=Keep(last=1)).save(make_state(1), 1)
    faults = Faults()
    gang = Gang(FaultyStore.over(uri, faults), tmp_path / "staging", keep=Keep(last=1))
    begun = len(faults.done)
    faults.fatal = begun + 6  # place, shard, manifest, MANIFEST, COMPLETE, the old marker's deletion; then death
    with pytest.raises(Killed):
        gang.save(make_state(2), 2)
    assert faults.done[-1] == "delete ckpt/00000001/1/COMPLETE"
    store = Store.open(uri)
    assert [(row.step, row.complete) for row in list_checkpoints(store, verify=True)] == [(1, False), (2, True)]
    Gang(store, tmp_path / "staging", attempt=2, keep=Keep(last=1), options={"resumed_from": 2}).save(make_state(3), 3)
    assert [row.step for row in list_checkpoints(store, verify=True)] == [3]


def test_leftovers_of_dead_attempts_go_and_those_of_live_ones_stay(store_uri: str, tmp_path: Path) -> None:
    store = Store.open(store_uri)
    for step, attempt in [(4, 1), (9, 1), (3, 2), (7, 2), (7, 3)]:
        store.put(f"{names.checkpoint(step, attempt)}rank-00000.safetensors", b"half")
    if (path := store.local_path("")) is not None:  # all that a writer killed in its first upload leaves on a disk
        (path / "ckpt/00000002/1").mkdir(parents=True)
        (path / "ckpt/00000002/1/rank-00000.safetensors#1").touch()
    Gang(store, tmp_path / "staging", attempt=2).save(make_state(5), 5)
    left = [(row.step, row.attempt) for row in list_checkpoints(store, verify=False)]
    assert left == [(5, 2), (7, 2), (7, 3)]
    assert len(store.folders(names.CHECKPOINTS)) == 2


def test_a_good_checkpoint_survives_a_damaged_one_that_is_newer(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}/x")
    gang = Gang(store, tmp_path / "staging", keep=Keep(last=2))
    gang.save(make_state(10), 10)
    gang.save(make_state(20), 20)
    shard = store.local_path("ckpt/00000020/1/rank-00000.safetensors")
    assert shard is not None
    shard.write_bytes(b"")
    options = {"resumed_from": 10}
    Gang(store, tmp_path / "staging", attempt=2, keep=Keep(last=2), options=options).save(make_state(25), 25)
    assert [(row.step, row.verified) for row in list_checkpoints(store, verify=True)] == [(10, True), (25, True)]
    found = newest_complete(store)
    assert found is not None
    assert found.meta.step == 25


class OvertakenStore(Store):
    """A store in which a later attempt commits, and cleans up, after this one's shard has gone up."""

    overtake: Callable[[], None]

    def put(self, key: str, data: bytes | Path, pace: Pace | None = None) -> None:
        super().put(key, data, pace)
        if isinstance(data, Path):
            self.overtake()


def test_an_attempt_whose_files_a_later_one_removed_says_why_it_stops(store_uri: str, tmp_path: Path) -> None:
    store = Store.open(store_uri)
    Gang(store, tmp_path / "staging").save(make_state(10), 10)

    def overtake() -> None:
        later = Gang(store, tmp_path / "later", attempt=2, options={"resumed_from": 10})
        later.save(make_state(21), 21)

    overtaken = OvertakenStore.open(store_uri)
    assert isinstance(overtaken, OvertakenStore)
    overtaken.overtake = overtake
    with pytest.raises(RunError, match="attempt 2 at this run has begun") as caught:
        Gang(overtaken, tmp_path / "staging").save(make_state(20), 20)
    assert caught.value.code == ExitCode.CONFIGURATION
    rows = list_checkpoints(store, verify=True)
    assert [(row.step, row.attempt, row.verified) for row in rows] == [(10, 1, True), (21, 2, True)]
