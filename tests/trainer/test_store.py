"""The contract of a store, held against a folder and against a real S3 server, and what its refusals say."""

from __future__ import annotations

import filecmp
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sft_api.run import ExitCode, RunError
from sft_trainer.store import PART_BYTES, ObjectMissing, Retry, Store
from sft_trainer.store_errors import as_run_error
from tests.s3 import S3Server

FIELD = "spec.checkpoints.uri"
BRIEF = Retry(seconds=0.2, request_seconds=5)


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A prefix that nobody has written to."""
    if request.param == "file":
        return f"file://{tmp_path}/runs/x"
    bucket: str = request.getfixturevalue("s3_bucket")
    return f"{bucket}/runs/x"


@pytest.fixture
def store(uri: str) -> Store:
    return Store.open(uri, path=FIELD, retry=BRIEF)


def keys(store: Store, prefix: str = "") -> list[str]:
    return sorted(info.key for info in store.list(prefix))


def test_what_was_put_is_read_back_whole_and_by_ranges(store: Store) -> None:
    store.put("a/b", b"0123456789")
    assert store.get("a/b") == b"0123456789"
    assert store.get_range("a/b", 2, 5) == b"234"
    assert store.get_range("a/b", 8, 99) == b"89"
    assert store.get_range("a/b", 10, 99) == b""
    assert store.get_range("a/b", 3, 3) == b""


def test_a_put_replaces_what_was_there(store: Store) -> None:
    store.put("a", b"old and longer")
    store.put("a", b"new")
    assert store.get("a") == b"new"


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("empty", b"")
    info = store.head("empty")
    assert info is not None
    assert info.size == 0
    assert store.get("empty") == b""


def test_odd_names_survive(store: Store) -> None:
    odd = "données + x/a b=c&d%20é.txt"
    store.put(odd, b"1")
    assert store.get(odd) == b"1"
    assert keys(store) == [odd]


def test_create_makes_an_object_once(store: Store) -> None:
    assert store.create("marker", b"first")
    assert not store.create("marker", b"second")
    assert store.get("marker") == b"first"


def test_of_many_writers_that_create_at_once_one_wins(store: Store) -> None:
    for turn in range(20):
        barrier = threading.Barrier(4)
        won: list[int] = []

        def write(number: int, turn: int = turn, barrier: threading.Barrier = barrier, won: list[int] = won) -> None:
            barrier.wait()
            if store.create(f"marker-{turn}", str(number).encode()):
                won.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.get(f"marker-{turn}") == str(won[0]).encode()


@pytest.mark.parametrize("read", [Store.get, lambda s, k: s.get_range(k, 0, 1), Store.open_reader])
def test_reading_what_is_not_there_names_it(store: Store, read: object) -> None:
    assert callable(read)
    with pytest.raises(ObjectMissing, match="runs/x/nothing"):
        read(store, "nothing")
    assert store.head("nothing") is None


def test_a_listing_shows_size_and_time_of_everything_below(store: Store) -> None:
    for key in ("a/1", "a/b/2", "ab/3"):
        store.put(key, b"xyz")
    assert keys(store) == ["a/1", "a/b/2", "ab/3"]
    assert keys(store, "a") == keys(store, "a/") == ["a/1", "a/b/2"]
    assert keys(store, "none") == []
    info = next(store.list("ab"))
    assert info.size == 3
    assert info.modified.tzinfo is not None


def test_folders_are_those_directly_below(store: Store) -> None:
    for key in ("a/1", "a/b/c/2", "a/d/3", "e/4"):
        store.put(key, b"")
    assert store.folders() == ["a", "e"]
    assert store.folders("a/") == ["a/b", "a/d"]
    assert store.folders("none") == []


def test_a_child_sees_its_own_prefix_only(store: Store) -> None:
    store.put("a/1", b"1")
    store.put("b/1", b"2")
    child = store.child("a/")
    assert child.uri == f"{store.uri}/a"
    assert keys(child) == ["1"]
    child.child("deeper").put("2", b"")
    assert keys(store, "a") == ["a/1", "a/deeper/2"]


def test_deleting_leaves_the_rest_and_minds_nothing_missing(store: Store) -> None:
    for key in ("a", "b", "c/d"):
        store.put(key, b"")
    store.delete(["a", "c/d", "never/was"])
    store.delete([])
    assert keys(store) == ["b"]


def test_a_file_larger_than_a_part_travels_up_and_down_unchanged(store: Store, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "sub" / "back"
    with source.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.seek(PART_BYTES - 100)
        file.write(bytes(range(1, 201)))
        file.seek(PART_BYTES + 12345)
        file.write(b"end")
    store.put("big", source)
    store.download("big", back)
    assert filecmp.cmp(source, back, shallow=False)
    assert store.get_range("big", PART_BYTES + 12345, PART_BYTES + 99999) == b"end"
    assert list(back.parent.iterdir()) == [back]


def test_a_download_that_fails_leaves_no_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing):
        store.download("nothing", tmp_path / "to" / "file")
    assert not (tmp_path / "to" / "file").exists()


def test_a_reader_reads_lines_and_seeks(store: Store) -> None:
    store.put("lines", b"one\ntwo\nthree\n")
    with store.open_reader("lines") as reader:
        assert reader.readline() == b"one\n"
        assert reader.seek(-6, os.SEEK_END) == 8
        assert reader.read() == b"three\n"
        assert reader.read() == b""
        assert reader.seek(4) == 4
        assert reader.read(3) == b"two"


def read_in_child(store: Store) -> bytes:
    return store.get("a")


def test_a_store_can_be_sent_to_another_process(store: Store) -> None:
    store.put("a", b"across")
    assert pickle.loads(pickle.dumps(store)).uri == store.uri
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_in_child, (store,)) == b"across"


def test_the_write_check_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    assert keys(store) == []


class BlindStore(Store):
    """A store whose conditional write is unconditional, as some S3 look-alikes have it."""

    def create(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


def test_a_store_without_conditional_writes_is_refused(uri: str) -> None:
    with pytest.raises(RunError, match="conditional writes") as caught:
        BlindStore.open(uri, path=FIELD, retry=BRIEF).check_writable()
    assert caught.value.code == ExitCode.STORE_REFUSED


def test_only_files_have_a_local_path(store: Store) -> None:
    store.put("a/b", b"here")
    path = store.local_path("a/b")
    assert (path is None) == store.uri.startswith("s3://")
    if path is not None:
        assert path.read_bytes() == b"here"
    store.make_durable(["a/b"])


def test_a_relative_folder_lies_under_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.open("file://runs/a%20b/")
    assert list(store.list()) == []
    assert not (tmp_path / "runs").exists()
    store.put("k", b"1")
    assert (tmp_path / "runs" / "a b" / "k").read_bytes() == b"1"
    assert store.uri == f"file://{tmp_path}/runs/a b"


def test_a_sweep_removes_orphans_of_its_prefix_and_empty_folders_only(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}/x")
    for key in ("ckpt/1/1/half", "ckpt/1/2/whole", "other/whole"):
        store.put(key, b"")
    (tmp_path / "x/ckpt/1/1/half").rename(tmp_path / "x/ckpt/1/1/half#1")
    (tmp_path / "x/ckpt/1/2/live#1").touch()
    assert keys(store, "ckpt/1/1") == []
    store.sweep("ckpt/1/1/")
    left = sorted(str(path.relative_to(tmp_path / "x")) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["ckpt/1/2/live#1", "ckpt/1/2/whole", "other/whole"]
    assert not (tmp_path / "x/ckpt/1/1").exists()
    store.delete(["ckpt/1/2/whole"])
    store.sweep("ckpt/1/2")
    assert not (tmp_path / "x/ckpt").exists()
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize("uri", ["hf://org/data", "s3://", "runs/x", "s3://bucket/../x", "file://", ""])
def test_what_is_no_store_is_refused_with_what_is_allowed(uri: str) -> None:
    with pytest.raises(RunError, match="s3://bucket/prefix") as caught:
        Store.open(uri, path=FIELD)
    assert caught.value.code == ExitCode.CONFIGURATION
    assert str(caught.value).startswith(FIELD)


def refusal(store: Store) -> RunError:
    with pytest.raises(RunError) as caught:
        store.check_writable()
    assert caught.value.path == FIELD
    return caught.value


def test_a_missing_bucket_is_named(s3_server: S3Server) -> None:
    store = Store.open("s3://no-such-bucket/x", path=FIELD, retry=BRIEF)
    error = refusal(store)
    assert error.code == ExitCode.STORE_REFUSED
    assert "NoSuchBucket" in error.message
    assert "create it, or correct the URI" in error.message
    with pytest.raises(RunError, match="NoSuchBucket"):
        list(store.list())
    with pytest.raises(RunError, match="NoSuchBucket"):
        store.get("a")


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("AWS_ACCESS_KEY_ID", "No user exists"),
        ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials_are_refused_in_the_stores_own_words(
    s3_bucket: str, variable: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong")
    error = refusal(Store.open(s3_bucket, path=FIELD, retry=BRIEF))
    assert error.code == ExitCode.STORE_REFUSED
    assert words in error.message
    assert "credentials are wrong" in error.message
    assert "Debug source" not in error.message


def test_a_store_that_may_only_be_read_is_refused(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_server.new_bucket()
    Store.open(bucket).put("a", b"1")
    with s3_server.read_only() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        store = Store.open(bucket, path=FIELD, retry=BRIEF)
        assert store.get("a") == b"1"
        error = refusal(store)
    assert error.code == ExitCode.STORE_REFUSED
    assert "AccessDenied" in error.message
    assert "read, write, list and delete" in error.message


def test_an_endpoint_that_is_gone_is_unavailable_and_named(s3_server: S3Server, tmp_path: Path) -> None:
    server = S3Server(tmp_path / "buckets")  # never started
    assert server.port != s3_server.port
    os.environ["AWS_ENDPOINT_URL"] = server.endpoint  # put back by the fixture
    error = refusal(Store.open("s3://bucket/x", path=FIELD, retry=BRIEF))
    assert error.code == ExitCode.STORE_UNAVAILABLE
    assert str(server.port) in error.message
    assert "could not be reached" in error.message


def test_an_outage_shorter_than_the_patience_is_ridden_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server(tmp_path / "buckets")
    bucket = server.new_bucket()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    store = Store.open(bucket, retry=Retry(seconds=60))
    store.put("a", b"before")
    server.kill()
    reading = threading.Thread(target=store.put, args=("b", b"during"))
    reading.start()
    server.start()
    reading.join()
    assert keys(store) == ["a", "b"]
    server.kill()


def test_a_file_where_a_folder_is_needed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refusal(Store.open(f"file://{tmp_path}/file", path=FIELD))
    assert error.code == ExitCode.STORE_REFUSED
    assert "choose another folder" in error.message


FULL_DISK = """
import sys
from pathlib import Path
from sft_api.run import RunError
from sft_trainer.store import Store
store = Store.open(f"file://{sys.argv[1]}")
store.put("small", b"kept")
try:
    store.put("large", bytes(2 << 20))
except RunError as error:
    print(int(error.code), error.message)
print(sorted(info.key for info in store.list()))
"""


def on_a_full_disk(folder: Path, script: str) -> str:
    """The output of a script whose argument is a file system of 1 MiB of its own. Skips where none can be mounted."""
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    probe = subprocess.run(["unshare", "-m", "sh", "-c", mount, str(folder), "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("a small file system to fill cannot be mounted here (needs root)")
    arguments = [sys.executable, "-c", script, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = ["unshare", "-m", "sh", "-c", mount, str(folder), *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout


def test_a_full_disk_is_refused_and_keeps_what_was_there(tmp_path: Path) -> None:
    output = on_a_full_disk(tmp_path, FULL_DISK)
    assert "13 writing file://" in output
    assert "No space left on device" in output
    assert "free some space" in output
    assert "['small']" in output


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("Error performing PUT http://169.254.169.254/latest/api/token", ExitCode.STORE_REFUSED),
        ("The provided token has expired: ExpiredToken", ExitCode.STORE_REFUSED),
        ("Unable to open file x#1: Read-only file system (os error 30)", ExitCode.STORE_REFUSED),
        ("Unable to open file x#1: Permission denied (os error 13)", ExitCode.STORE_REFUSED),
        ("Server returned non-2xx status code: 403 Forbidden: resolve", ExitCode.STORE_REFUSED),
        (
            "Error performing GET http://h/read-only/x in 403.1ms: timed out",
            ExitCode.STORE_UNAVAILABLE,
        ),
        ("Server returned non-2xx status code: 503 Service Unavailable: SlowDown", ExitCode.STORE_UNAVAILABLE),
        ("something that nobody has seen before", ExitCode.STORE_UNAVAILABLE),
    ],
)
def test_words_decide_whether_waiting_helps(words: str, code: ExitCode) -> None:
    error = as_run_error(OSError(words), "writing s3://b/k", FIELD)
    assert error.code == code
    assert words in error.message
    assert error.message.startswith("writing s3://b/k: ")
