"""A real API server with its etcd, and nothing else: Kubernetes as a client sees it, without nodes or controllers.

    def test_something(api: ApiServer) -> None: ...       # shared by the session: make a namespace of your own

`tests/tools/build_tools.sh` builds it. Where it is missing these tests skip, and under CI they fail.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.cluster import control_plane
from tests.cluster.client import Client, Manifest
from tests.cluster.layout import Layout
from tests.cluster.machine import CACHE, MANIFESTS
from tests.cluster.pki import write_pki
from tests.cluster.processes import Processes
from tests.cluster.waiting import is_true, wait_for

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "crds" / "sftjobs.sftjob.dev.yaml"
START_SECONDS = 120.0


class Alone(Layout):
    """On a loopback address of this process's own, in place of a bridge."""

    @property
    def loopback(self) -> str:
        return f"127.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}.1"

    @property
    def host(self) -> str:
        return self.loopback


class TiedProcesses(Processes):
    """They end with this process, whatever ends that, and can be started again."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self._commands: dict[str, list[str | Path]] = {}

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        # A loopback address cannot be the endpoint of the Service `kubernetes`, which nobody here needs.
        loopback = ["--endpoint-reconciler-type=none"] if name == "kube-apiserver" else []
        self._commands[name] = ["setpriv", "--pdeathsig", "KILL", *command, *loopback]
        self.start_again(name)

    def start_again(self, name: str) -> None:
        super().start(name, self._commands[name])


class ApiServer:
    """The server, its administrator's client, and namespaces."""

    def __init__(self, layout: Layout, processes: TiedProcesses) -> None:
        self.layout = layout
        self.client = Client.of(layout)
        self._processes = processes
        self._names = itertools.count(1)

    @property
    def kubeconfig(self) -> str:
        return str(self.layout.kubeconfig)

    def new_namespace(self) -> str:
        name = f"test-{next(self._names)}"
        self.client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        return name

    def kill(self) -> None:
        """kill -9 of the API server alone."""
        self._processes.kill(["kube-apiserver"])

    def start(self) -> None:
        """Returns when it answers."""
        self._processes.start_again("kube-apiserver")
        self.wait()

    def wait(self) -> None:
        wait_for("the API server is ready", self.client.is_ready, START_SECONDS, self.last_words)

    def last_words(self) -> str:
        return "\n".join(f"{name}: {self._processes.log_tail(name)}" for name in ("etcd", "kube-apiserver"))


def what_is_missing() -> str | None:
    for path in (CACHE / "bin" / "kubernetes", MANIFESTS):
        if not path.exists():
            return f"there is no API server at {path}: tests/tools/build_tools.sh builds it"
    return None


@contextmanager
def running(state: Path) -> Iterator[ApiServer]:
    """One that serves SFTJobs and PyTorchJobs."""
    layout, processes = Alone(0, state / "cluster"), TiedProcesses(state)
    layout.bin.mkdir(parents=True)
    for program in ("etcd", "kube-apiserver"):
        (layout.bin / program).symlink_to(CACHE / "bin" / "kubernetes")
    write_pki(layout)
    control_plane.start_api(layout, processes)
    server = ApiServer(layout, processes)
    try:
        server.wait()
        for crd in crds():
            server.client.apply(crd)
        wait_for("the CRDs are served", lambda: are_served(server.client), START_SECONDS, server.last_words)
        yield server
    finally:
        server.client.close()
        processes.kill(("kube-apiserver", "etcd"))
        shutil.rmtree(state, ignore_errors=True)


def crds() -> Iterator[Manifest]:
    for path in (CRD, MANIFESTS):
        for manifest in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            if manifest and manifest["kind"] == "CustomResourceDefinition":
                yield manifest


def are_served(client: Client) -> bool:
    return all(is_true(crd, "Established") for crd in client.list("CustomResourceDefinition"))


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if missing := what_is_missing():
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with running(tmp_path_factory.mktemp("api-server")) as server:
        yield server
