"""Object storage: one prefix of a bucket, or of a folder, as a small set of operations. The only user of obstore.

Errors are converted here and nowhere else:

    ObjectMissing                     the object is not there
    RunError(STORE_REFUSED)           credentials, permission, missing bucket, read-only, disk full: nothing to wait for
    RunError(STORE_UNAVAILABLE)       not reachable after retries with back-off: worth another attempt

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …).
"""

from __future__ import annotations

import copy
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, TypeVar
from urllib.parse import unquote

import obstore
from obstore import exceptions as obstore_errors
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from sft_api.run import ExitCode, RunError
from sft_trainer import store_files
from sft_trainer.store_errors import Outage, as_run_error, is_missing_object
from sft_trainer.store_pace import Pace
from sft_trainer.store_reader import RangeReader
from sft_trainer.store_uploads import Bucket

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

PART_BYTES = 64 * 1024 * 1024
"""Size of a multipart upload's parts, and of a download's ranges. Larger objects go up in parts."""
CONCURRENT_PARTS = 4
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 10.0
"""Between tries at a request."""
READ_AHEAD_BYTES = 8 * 1024 * 1024

_Backend: TypeAlias = S3Store | GCSStore | AzureStore | LocalStore
_Folders: TypeAlias = list[str]  # inside the class, `list` is a method
_Answer = TypeVar("_Answer")
_BEYOND_END = re.compile(r"range was invalid|InvalidRange|Range Not Satisfiable", re.IGNORECASE)


@dataclass(frozen=True)
class ObjectInfo:
    """An object as a listing shows it. `size` in bytes, `modified` with a time zone."""

    key: str
    size: int
    modified: datetime


class ObjectMissing(KeyError):
    """There is no object of this key. `str()` is its full URI."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Retry:
    """How long a store that does not answer is tried, with exponential back-off and jitter."""

    seconds: float = 180.0
    request_seconds: float = 120.0
    """Limit of a single request; a part of 64 MiB has to fit."""

    @classmethod
    def from_environment(cls) -> Retry:
        """SFT_STORE_RETRY_SECONDS overrides how long an outage is ridden out."""
        given = os.environ.get("SFT_STORE_RETRY_SECONDS")
        return cls(seconds=float(given)) if given else cls()


class Store:
    """A prefix in an object store. Keys are relative to it, with `/` between folders and none at either end.

    Methods may be called from any thread. A Store can be sent to another process; after a fork it must not be used.
    """

    def __init__(self, backend: _Backend, uri: str, prefix: str, retry: Retry, *, root: Path | None, path: str | None):
        """Use `Store.open`. `root`: the folder that the prefix stands for, on file:// only."""
        self._backend = backend
        self._prefix = prefix
        self._retry = retry
        self._root = root
        self._path = path
        self.uri = uri

    @classmethod
    def open(cls, uri: str, *, path: str | None = None, retry: Retry | None = None) -> Store:
        """The store at `uri`: file://, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.

        file:// may be relative to the working directory (`file://runs/x`), and need not exist yet. Nothing is asked
        of the store here. `path`: the field of the manifest that holds the URI, for messages.
        """
        scheme, separator, rest = uri.partition("://")
        retry = retry or Retry.from_environment()
        if scheme == "file" and rest:
            return cls._open_folder(rest, retry, path)
        bucket, _, prefix = rest.partition("/")
        dots = {".", ".."}.intersection(prefix.split("/"))
        if not separator or scheme not in ("s3", "gs", "az") or not bucket or dots:
            allowed = "file://folder, s3://bucket/prefix, gs://bucket/prefix and az://container/prefix"
            raise RunError(ExitCode.CONFIGURATION, f"{uri!r} is not the URI of a store; allowed are {allowed}.", path)
        prefix = "/".join(part for part in prefix.split("/") if part)
        uri = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        with _converted(f"opening {uri}", uri, path):
            backend = _remote(scheme, bucket, retry)
        return cls(backend, uri, prefix, retry, root=None, path=path)

    @classmethod
    def _open_folder(cls, rest: str, retry: Retry, path: str | None) -> Store:
        # One backend at the root of the file system: opening a store then makes no folder, and reading one that does
        # not exist finds it empty.
        root = Path(unquote(rest)).expanduser().resolve()
        return cls(LocalStore(), f"file://{root}", str(root).strip("/"), retry, root=root, path=path)

    def child(self, prefix: str) -> Store:
        """The store under `prefix`."""
        child = copy.copy(self)
        prefix = prefix.strip("/")
        child._prefix = self._key(prefix)
        child._root = self._root / prefix if self._root else None
        child.uri = f"{self.uri}/{prefix}".rstrip("/")
        return child

    def put(self, key: str, data: bytes | Path, pace: Pace | None = None) -> None:
        """Write an object, whole or not at all; one that is there is replaced. Multipart above 64 MiB.

        `pace`: how fast a file's bytes may leave.
        """
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        part_bytes = pace.part_bytes(size, PART_BYTES) if pace else PART_BYTES

        def request() -> None:
            obstore.put(
                self._backend,
                self._key(key),
                pace.read(data) if pace and isinstance(data, Path) else data,
                use_multipart=size > part_bytes,
                chunk_size=part_bytes,
                max_concurrency=CONCURRENT_PARTS,
            )

        self._insist(request, "writing", key)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object if there is none of this key, in one atomic step. False if there was one already.

        False also where our own write arrived and its answer was lost: who needs to know compares the contents.
        """

        def request() -> bool:
            try:
                obstore.put(self._backend, self._key(key), data, mode="create", use_multipart=False)
            except (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError):
                return False
            return True

        return self._insist(request, "writing", key)

    def get(self, key: str) -> bytes:
        """A whole object. Raises ObjectMissing."""
        with self._errors("reading", key):
            return bytes(obstore.get(self._backend, self._key(key)).bytes())

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, as a slice gives them: short or empty at its end. Raises ObjectMissing."""
        assert 0 <= start <= stop, (start, stop)
        if start == stop:
            return b""
        with self._errors("reading", key):
            try:
                return bytes(obstore.get_range(self._backend, self._key(key), start=start, end=stop))
            except obstore_errors.GenericError as error:
                if _BEYOND_END.search(str(error)):
                    return b""
                raise

    def open_reader(self, key: str) -> BinaryIO:
        """The object as a buffered, seekable file. Raises ObjectMissing."""
        if local := self.local_path(key):
            with self._errors("reading", key):
                return local.open("rb")
        info = self.head(key)
        if info is None:
            raise ObjectMissing(f"{self.uri}/{key}")
        return BufferedReader(RangeReader(lambda a, b: self.get_range(key, a, b), info.size), READ_AHEAD_BYTES)

    def download(self, key: str, path: Path) -> None:
        """Write the object to the local file `path`, which appears whole or not at all. Raises ObjectMissing."""
        info = self.head(key)
        if info is None:
            raise ObjectMissing(f"{self.uri}/{key}")
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with self._errors("downloading", key):
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    self._fill(file.fileno(), key, info.size)
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _fill(self, descriptor: int, key: str, size: int) -> None:
        def copy_part(start: int) -> None:
            part = self.get_range(key, start, min(start + PART_BYTES, size))
            os.pwrite(descriptor, part, start)

        with ThreadPoolExecutor(CONCURRENT_PARTS) as threads:
            list(threads.map(copy_part, range(0, size, PART_BYTES)))

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object; None if there is none."""
        try:
            with self._errors("reading", key):
                meta = obstore.head(self._backend, self._key(key))
        except ObjectMissing:
            return None
        return ObjectInfo(key, meta["size"], meta["last_modified"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object under the folder `prefix`, at any depth, in no order. Empty if there is no such folder."""
        with self._errors("listing", prefix):
            for batch in obstore.list(self._backend, self._key(prefix) or None, chunk_size=1000):
                for meta in batch:
                    yield ObjectInfo(self._relative(meta["path"]), meta["size"], meta["last_modified"])

    def folders(self, prefix: str = "") -> _Folders:
        """Keys of the folders directly under `prefix`, sorted, without a slash at the end."""
        with self._errors("listing", prefix):
            found = obstore.list_with_delimiter(self._backend, self._key(prefix) or None)
        return sorted(self._relative(folder.rstrip("/")) for folder in found["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in no order; one that is not there is no error. Outlives a power cut."""
        paths = [self._key(key) for key in keys]

        def request() -> None:
            if self._root is not None:
                store_files.delete(Path("/", path) for path in paths)
            elif paths:
                obstore.delete(self._backend, paths)

        self._insist(request, "deleting", "")

    def local_path(self, key: str) -> Path | None:
        """The file that is the object, for memory-mapping without a copy: on file:// only."""
        return self._root / key if self._root is not None else None

    def make_durable(self, keys: Iterable[str]) -> None:
        """Return when these objects outlive a power cut: fsync of files and folders on file://, nothing elsewhere."""
        if self._root is not None:
            with self._errors("syncing", ""):
                store_files.make_durable(self._root, keys)

    def sweep(self, prefix: str) -> None:
        """Remove what a killed writer left under `prefix` on file://: half-written `name#1` files, empty folders.

        Only for a prefix that nobody writes to; of the folders above it, those that are empty go too. Elsewhere there
        is nothing to see: see `end_uploads`.
        """
        if self._root is not None:
            with self._errors("deleting", prefix):
                store_files.sweep(self._root, prefix.strip("/"))

    def end_uploads(self, prefix: str, begun_before: datetime) -> int:
        """End the uploads under the folder `prefix` that began earlier, by the store's clock, and were never ended.

        Returns their number. Only on s3:// and with the keys in the environment; docs/checkpoints.md has the rest.
        """
        scheme, _, place = self.uri.partition("://")
        bucket = Bucket.of(place.split("/")[0], os.environ) if scheme == "s3" else None
        if bucket is None:
            return 0
        with self._errors("ending uploads under", prefix):
            return bucket.end_uploads(f"{self._key(prefix)}/", begun_before)

    def check_writable(self) -> None:
        """Pre-flight: write, read back and delete a small object, and see that a second create is refused."""
        name = uuid.uuid4().hex
        key, body = f".write-check-{name}", name.encode()
        self.create(key, body)  # False where the answer was lost: what counts is what is there
        try:
            if self.get(key) != body:
                raise self._refused("gave back other bytes than were written")
            if self.create(key, body):
                raise self._refused("does not honour conditional writes (If-None-Match), by which checkpoints commit")
        except ObjectMissing:
            raise self._refused("does not show an object that was just written") from None
        finally:
            self.delete([key])

    def _refused(self, what: str) -> RunError:
        return RunError(ExitCode.STORE_REFUSED, f"the store at {self.uri} {what}: use another store.", self._path)

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}".strip("/")

    def _relative(self, path: str) -> str:
        return path[len(self._prefix) + 1 :] if self._prefix else path

    def _insist(self, request: Callable[[], _Answer], doing: str, key: str) -> _Answer:
        """Make a request that may be made twice. obstore gives up at once on a write that got no answer in time."""
        deadline, pause = time.monotonic() + self._retry.seconds, FIRST_PAUSE_SECONDS
        while True:
            try:
                with self._errors(doing, key):
                    return request()
            except Outage:
                if self._root is not None or time.monotonic() + pause >= deadline:
                    raise
            Event().wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    @contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        uri = f"{self.uri}/{key}".rstrip("/")
        with _converted(f"{doing} {uri}", uri, self._path):
            yield


@contextmanager
def _converted(doing: str, uri: str, path: str | None) -> Iterator[None]:
    """Turn what obstore and the file system raise into ObjectMissing and RunError."""
    try:
        yield
    except FileNotFoundError as error:
        if is_missing_object(error):
            raise ObjectMissing(uri) from error
        raise as_run_error(error, doing, path, refused=True) from error
    except (
        obstore_errors.PermissionDeniedError,
        obstore_errors.UnauthenticatedError,
        obstore_errors.UnknownConfigurationKeyError,
        obstore_errors.InvalidPathError,
        PermissionError,
    ) as error:
        raise as_run_error(error, doing, path, refused=True) from error
    except (obstore_errors.BaseError, OSError) as error:
        raise as_run_error(error, doing, path) from error


def _remote(scheme: str, bucket: str, retry: Retry) -> _Backend:
    """A bucket, with credentials, region and endpoint from the environment. Plain-http endpoints are allowed."""
    client: ClientConfig = {"allow_http": True, "timeout": timedelta(seconds=retry.request_seconds)}
    retries: RetryConfig = {
        # The time decides, not the number.
        "max_retries": 1000,
        "retry_timeout": timedelta(seconds=retry.seconds),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE_SECONDS),
            "max_backoff": timedelta(seconds=LONGEST_PAUSE_SECONDS),
            "base": 2,
        },
    }
    if scheme == "s3":
        return S3Store(bucket, client_options=client, retry_config=retries)
    if scheme == "gs":
        return GCSStore(bucket, client_options=client, retry_config=retries)
    return AzureStore(bucket, client_options=client, retry_config=retries)
