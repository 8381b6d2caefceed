from __future__ import annotations

import pytest

from sft_api import names


def test_a_checkpoint_says_its_step_and_attempt() -> None:
    assert names.checkpoint(1200, 3) == "ckpt/00001200/3/"
    assert names.parse_checkpoint("ckpt/00001200/3/COMPLETE") == (1200, 3)
    assert names.parse_checkpoint("ckpt/00001200/3") == (1200, 3)


@pytest.mark.parametrize(
    "key", ["ckpt/1200/3/COMPLETE", "ckpt/00001200/x/", "export/00001200/3/", "x/ckpt/00001200/3/"]
)
def test_what_is_no_checkpoint_is_none(key: str) -> None:
    assert names.parse_checkpoint(key) is None


def test_checkpoints_sort_as_their_steps_do() -> None:
    keys = [names.checkpoint(step, 1) for step in (9, 10, 99_999, 100_000, 99_999_999)]
    assert keys == sorted(keys)


def test_metrics_say_their_attempt() -> None:
    assert names.metrics(2) == "metrics/attempt-2.jsonl"
    assert names.parse_metrics(names.metrics(12)) == 12
    assert names.parse_metrics("metrics/attempt-2.jsonl.tmp") is None


def test_an_export_and_prepared_data_have_folders_of_their_own() -> None:
    assert names.export("stacked") == "export/stacked/"
    assert names.prepared("0f3c") == "0f3c/"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [("s3://a/b//", "s3://a/b"), ("s3://a", "s3://a"), ("file://x/", "file://x")],
)
def test_slashes_at_the_end_say_nothing(uri: str, expected: str) -> None:
    assert names.without_slash(uri) == expected


def test_an_attempt_has_its_number_and_its_events() -> None:
    assert names.attempt(3) == "attempts/3.json"
    assert names.parse_attempt(names.attempt(12)) == 12
    assert names.parse_attempt("attempts/x.json") is None
    assert names.events(3) == "events/attempt-3.jsonl"
