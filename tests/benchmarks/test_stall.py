"""The benchmark of a save's stall, on a state that takes no time: what it compares is what it says."""

from __future__ import annotations

from pathlib import Path

from benchmarks.stall import compare

MEGABYTES, BYTES_PER_SECOND = 10, 5e6


def test_the_stall_is_a_part_of_the_save_and_a_network_makes_that_longer(s3_bucket: str, tmp_path: Path) -> None:
    (seconds, share), note = compare(s3_bucket, tmp_path, MEGABYTES, 1, "cpu", BYTES_PER_SECOND)
    assert seconds.peer is not None
    assert 0 < seconds.ours.median < seconds.peer.median
    assert share.ours.median == seconds.ours.median / seconds.peer.median
    assert seconds.peer.median >= MEGABYTES * 1e6 / BYTES_PER_SECOND
    assert f"{MEGABYTES} MB" in note
