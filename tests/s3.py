"""A real S3 server for tests: versitygw over a folder, on a free loopback port.

    def test_something(s3_bucket: str) -> None:      # "s3://bucket-1", credentials and endpoint in the environment
    def test_other(s3_server: S3Server) -> None:     # for more buckets, a read-only view, kill and restart

`tests/tools/build_tools.sh` builds the server. Where it is missing these tests skip, and under CI they fail.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

START_SECONDS = 30.0


def versitygw() -> Path:
    """The server's program. Skips the test where it is not there."""
    cache = Path(os.environ.get("SFTJOB_CACHE") or Path.home() / ".cache" / "sftjob")
    program = cache / "bin" / "versitygw"
    if not program.exists():
        reason = f"there is no S3 server at {program}: tests/tools/build_tools.sh builds it"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return program


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class S3Server:
    """A versitygw over `folder`, in which every folder is a bucket and every file an object."""

    access_key = "test-access-key"
    secret_key = "test-secret-key"

    def __init__(self, folder: Path, *, address: str = "127.0.0.1", read_only: bool = False):
        self.folder = folder
        self._address = address
        self._port: int | None = None
        self._read_only = read_only
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)

    @property
    def port(self) -> int:
        """Chosen when it is first asked for, and the same ever after."""
        self._port = self._port or _free_port(self._address)
        return self._port

    @property
    def endpoint(self) -> str:
        return f"http://{self._address}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the S3 server is not running"
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs: the credentials, the endpoint, and short patience with an endpoint that is gone."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "SFT_STORE_RETRY_SECONDS": "5",
        }

    def new_bucket(self) -> str:
        """An empty bucket's URI."""
        name = f"bucket-{next(self._names)}"
        (self.folder / name).mkdir(parents=True)
        return f"s3://{name}"

    def start(self) -> None:
        """Begin to serve, on the same port as ever; returns when connections are taken."""
        keys = ["--access", self.access_key, "--secret", self.secret_key]
        mode = ["--readonly"] if self._read_only else []
        serve = ["--port", f"{self._address}:{self.port}", "--quiet", *keys, *mode, "posix", str(self.folder)]
        with (self.folder.parent / "versitygw.log").open("ab") as log:
            self._process = subprocess.Popen([str(versitygw()), *serve], stdout=log, stderr=log, start_new_session=True)
        self._await_port()

    def kill(self) -> None:
        """kill -9; what was not answered is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def read_only(self) -> Iterator[S3Server]:
        """A second server over the same buckets that refuses every write."""
        other = S3Server(self.folder, address=self._address, read_only=True)
        other.start()
        try:
            yield other
        finally:
            other.kill()

    def _await_port(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection((self._address, self.port), timeout=1).close()
                return
            except OSError:
                log = (self.folder.parent / "versitygw.log").read_text(errors="replace")
                assert self._process.poll() is None, f"the S3 server ended at once: {log[-2000:]}"
                assert time.monotonic() < deadline, f"the S3 server did not start: {log[-2000:]}"
                Event().wait(0.02)


@pytest.fixture(scope="session")
def s3_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests of the session."""
    versitygw()
    folder = tmp_path_factory.mktemp("s3") / "buckets"
    folder.mkdir()
    server = S3Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3_server(s3_session: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its credentials and endpoint in this process's environment and its children's."""
    for name, value in s3_session.environment.items():
        monkeypatch.setenv(name, value)
    return s3_session


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> str:
    """The URI of an empty bucket."""
    return s3_server.new_bucket()
