"""Uploads that are held to a pace: as slow as they were told to be, whole, and let go when training waits."""

from __future__ import annotations

import filecmp
import os
import threading
import time
from pathlib import Path

import pytest

from sft_api.spec import Saving
from sft_trainer.checkpoint import newest_complete
from sft_trainer.saving import upload_share
from sft_trainer.store import PART_BYTES, Store
from sft_trainer.store_pace import MOST_PARTS, SMALLEST_PART_BYTES, Pace
from tests.trainer.checkpoints import Gang, make_state, read_state, same
from tests.trainer.runs import make_base, make_run


def test_a_limited_upload_takes_its_time_and_arrives_whole(store_uri: str, tmp_path: Path) -> None:
    store, source = Store.open(store_uri), tmp_path / "source"
    source.write_bytes(os.urandom(SMALLEST_PART_BYTES + (1 << 20)))  # two parts
    seconds, pace = 0.5, source.stat().st_size / 0.5
    started = time.perf_counter()
    store.put("limited", source, Pace(pace))
    assert time.perf_counter() - started >= seconds
    store.download("limited", tmp_path / "back")
    assert filecmp.cmp(source, tmp_path / "back", shallow=False)


def test_what_training_waits_for_is_not_held_back(store_uri: str, tmp_path: Path) -> None:
    state = make_state(1)
    committed = threading.Event()
    options = {"bytes_per_second": 1e-3, "on_commit": lambda event: committed.set()}
    gang = Gang(Store.open(store_uri), tmp_path / "staging", world=2, options=options)
    gang.begin(state, 10)
    assert not committed.wait(0.5)
    gang.wait()
    assert committed.is_set()
    found = newest_complete(Store.open(store_uri))
    assert found is not None
    assert same(read_state(found), state)


@pytest.mark.parametrize(
    ("bytes_per_second", "size", "parts_of"),
    [
        (1e6, 1 << 30, SMALLEST_PART_BYTES),
        (2e7, 1 << 30, 20_000_000),
        (1e12, 1 << 30, PART_BYTES),
        (1e6, MOST_PARTS * PART_BYTES, PART_BYTES),
    ],
    ids=["slow", "a second's worth", "fast", "large"],
)
def test_parts_are_small_enough_to_spread_out_and_few_enough_for_s3(
    bytes_per_second: float, size: int, parts_of: int
) -> None:
    assert Pace(bytes_per_second).part_bytes(size, PART_BYTES) == parts_of


def test_the_ranks_of_a_machine_share_what_it_may_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(make_base(tmp_path), f"file://{tmp_path}/x", {"checkpoints": {"uploadMegabytesPerSecond": 100}})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert upload_share(config) == 25e6
    unlimited = config.model_copy(update={"checkpoints": Saving(uri=config.checkpoints.uri)})
    assert upload_share(unlimited) is None
