"""Uploads that a killed writer left unfinished, on a real S3 server: seen, ended, and nobody else's with them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import pytest

from sft_api import names
from sft_api.run import ExitCode, RunError
from sft_trainer.checkpoint import newest_complete
from sft_trainer.store import Store
from sft_trainer.store_pace import SMALLEST_PART_BYTES
from sft_trainer.store_uploads import Bucket
from tests.s3 import S3Server
from tests.trainer.checkpoints import Gang, make_state, take_number_later

WRITER = """
import sys
from pathlib import Path
from sft_trainer.store import Store
from sft_trainer.store_pace import Pace
Store.open(sys.argv[1]).put(sys.argv[2], Path(sys.argv[3]), Pace(1e7))
"""
LONGEST_WAIT_SECONDS = 60


def bucket_at(uri: str) -> Bucket:
    bucket = Bucket.of(uri.removeprefix("s3://"), os.environ)
    assert bucket is not None
    return bucket


def left(bucket: Bucket, prefix: str = "") -> list[str]:
    return sorted(upload.key for upload in bucket.uploads(prefix))


def killed_in_the_middle(uri: str, key: str, folder: Path) -> None:
    """A process that uploads an object in parts, and is killed after it has begun and before it is done."""
    source, bucket = folder / "source", bucket_at("/".join(uri.split("/")[:3]))
    source.write_bytes(bytes(100 * SMALLEST_PART_BYTES // 20))  # five parts, four seconds' worth
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", WRITER, uri, key, str(source)], env=environment)
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not any(upload.endswith(key) for upload in left(bucket)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        Event().wait(0.02)
    process.kill()
    process.wait()
    assert Store.open(uri).head(key) is None


def test_uploads_of_a_killed_attempt_are_ended_by_the_next_and_no_others(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    bucket, store = bucket_at(s3_bucket), Store.open(f"{s3_bucket}/x")
    shard = f"{names.checkpoint(10, 1)}rank-00000.safetensors"
    killed_in_the_middle(store.uri, shard, tmp_path)
    others = ["y/ckpt/00000010/1/rank-00000.safetensors", "x/data/shared", "x/ckpt2/1"]
    for key in [f"x/{names.export('one')}model.safetensors", *others]:
        begin(bucket, key)
    take_number_later(store, s3_server, 2, seconds=10)
    Gang(store, tmp_path / "staging", attempt=2).save(make_state(), 20)
    assert left(bucket) == sorted(others)


def test_uploads_of_this_attempt_go_on(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    bucket, store = bucket_at(s3_bucket), Store.open(f"{s3_bucket}/x")
    take_number_later(store, s3_server, 1, seconds=0)
    mine = f"x/{names.export('one')}model.safetensors"
    begin(bucket, mine)
    Gang(store, tmp_path / "staging").save(make_state(), 20)
    assert left(bucket) == [mine]


def begin(bucket: Bucket, key: str) -> None:
    bucket._request("POST", key, {"uploads": ""})


def test_every_upload_is_ended_whatever_it_is_called_and_however_many_there_are(s3_bucket: str) -> None:
    bucket = bucket_at(s3_bucket)
    keys = sorted(f"données + x/a b=c&d%20é~{number}.txt" for number in range(5))
    for key in [*keys, "elsewhere"]:
        begin(bucket, key)
    now = datetime.now(UTC)
    found = bucket.uploads("données + x/")
    assert sorted(upload.key for upload in found) == keys
    assert all(abs(upload.begun - now) < timedelta(seconds=LONGEST_WAIT_SECONDS) for upload in found)
    assert bucket.end_uploads("données + x/", now + timedelta(minutes=1), page_size=2) == len(keys)
    assert left(bucket) == ["elsewhere"]


def test_an_upload_that_ends_meanwhile_is_no_error(s3_bucket: str) -> None:
    bucket = bucket_at(s3_bucket)
    begin(bucket, "a")
    (upload,) = bucket.uploads("")
    bucket.end_uploads("", datetime.now(UTC) + timedelta(minutes=1))
    bucket._abort(upload)
    assert left(bucket) == []


def test_a_session_token_is_shown_to_the_store(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another store")  # ours knows of none
    with pytest.raises(OSError, match="InvalidToken"):
        left(bucket_at(s3_bucket))


def test_a_refusal_is_told_in_the_stores_own_words(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(RunError, match="SignatureDoesNotMatch") as caught:
        Store.open(f"{s3_bucket}/x").end_uploads("ckpt/", datetime.now(UTC))
    assert caught.value.code == ExitCode.STORE_REFUSED


def test_without_keys_in_the_environment_and_on_disk_nothing_is_done(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(bucket_at(s3_bucket), "x/ckpt/a")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert Store.open(f"file://{tmp_path}/x").end_uploads("ckpt/", tomorrow) == 0
    store = Store.open(f"{s3_bucket}/x")
    with monkeypatch.context() as bare:
        bare.delenv("AWS_SECRET_ACCESS_KEY")
        assert store.end_uploads("ckpt/", tomorrow) == 0
    assert store.end_uploads("ckpt/", tomorrow) == 1


class UnwillingStore(Store):
    """A store that does not know of uploads."""

    def end_uploads(self, prefix: str, begun_before: datetime) -> int:
        raise RunError(ExitCode.STORE_REFUSED, "NotImplemented")


def test_a_store_that_cannot_end_uploads_ends_no_run(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = UnwillingStore.open(f"file://{tmp_path}/x")
    gang = Gang(store, tmp_path / "staging", options={"warn": warnings.append})
    gang.save(make_state(), 10)
    gang.save(make_state(), 20)
    assert warnings == ["uploads that dead attempts left unfinished stay in the bucket: NotImplemented"]
    found = newest_complete(store)
    assert found is not None
    assert found.meta.step == 20
