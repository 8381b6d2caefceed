"""A Kubernetes cluster on this machine: brought up from programs that were built here, taken down without a trace.

etcd, API server, controller manager, scheduler, DNS     processes of this machine, on the bridge's address
two nodes                                                namespaces with a kubelet, containerd and 8 "GPUs" each
training operator                                        a pod
S3 server                                                a process, on the bridge's address
"""

from __future__ import annotations

import datetime
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, TypeVar

from tests.cluster import control_plane, hostpy, network, training_operator
from tests.cluster.client import Client
from tests.cluster.images import ROOT, write_images
from tests.cluster.layout import Layout
from tests.cluster.machine import CACHE, MANIFESTS
from tests.cluster.node import Node, remove_cgroups
from tests.cluster.pki import write_pki
from tests.cluster.processes import Processes
from tests.cluster.waiting import describe, is_true, wait_for
from tests.s3 import S3Server

T = TypeVar("T")
PROGRAMS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "coredns",
    "kubectl",
)
"""One binary under eight names."""
GPUS = "8"
GUARD = "guard"
START_SECONDS = 120.0


class BedS3(S3Server):
    """The cluster's S3 server, on the bridge's address, which pods and this machine share."""

    def __init__(self, layout: Layout, processes: Processes) -> None:
        super().__init__(layout.state / "s3" / "buckets", address=layout.host)
        self._processes = processes

    def start(self) -> None:
        super().start()
        self._processes.record("versitygw", self.pid)


class Bed:
    """The cluster as far as this machine knows it; `Cluster` is what it is to those who use it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.processes = Processes(layout.state)
        self.nodes = {place.name: Node(layout, place, self.processes) for place in layout.nodes}
        self.s3 = BedS3(layout, self.processes)
        self._client: Client | None = None

    @classmethod
    def up(cls, state: Path, *, ends_with: int | None = None) -> Bed:
        """Bring one up; with the process of the pid `ends_with` it goes, whatever ends that."""
        bed = cls(Layout(network.claim_slot(), state))
        try:
            state.mkdir(parents=True, exist_ok=True)
            (state / "slot").write_text(str(bed.layout.slot))
            if ends_with is not None:
                bed._start_guard(ends_with)
            bed._bring_up()
        except BaseException:
            bed.down()
            raise
        return bed

    @classmethod
    def find(cls, state: Path) -> Bed | None:
        """The one with that state folder."""
        slot = state / "slot"
        return cls(Layout(int(slot.read_text()), state)) if slot.exists() else None

    def down(self) -> None:
        """Take down whatever of it is there; where one step fails the others are still taken."""
        with ExitStack() as steps:  # the last first
            steps.callback(shutil.rmtree, self.layout.state)
            steps.callback(network.disconnect, self.layout)
            for place in self.layout.nodes:
                steps.callback(remove_cgroups, place)
            steps.callback(self._kill_all)
            if self._client:
                steps.callback(self._client.close)

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client.of(self.layout)
        return self._client

    def wait_for(self, what: str, probe: Callable[[], T | Literal[False] | None], seconds: float) -> T:
        return wait_for(what, probe, seconds, self._describe)

    def start_node(self, name: str) -> None:
        """Switch a node on, and return when it takes pods."""
        started = datetime.datetime.now(datetime.UTC)
        self.nodes[name].start()
        self.wait_for(f"{name} is Ready", lambda: self._is_ready(name, started), START_SECONDS)

    def _bring_up(self) -> None:
        self._link_programs()
        network.connect(self.layout)
        write_pki(self.layout)
        control_plane.start_api(self.layout, self.processes)
        # While the API server starts:
        write_images(CACHE / "bin" / "training-operator", self.layout.state / "images" / "all.tar")
        hostpy.write_spec(self.layout.state)
        for node in self.nodes.values():
            node.configure()
        self.s3.folder.mkdir(parents=True)
        self.s3.start()
        wait_for("the API server is ready", self.client.is_ready, START_SECONDS, self._describe_processes)
        control_plane.start_controllers(self.layout, self.processes)
        started = datetime.datetime.now(datetime.UTC)
        for node in self.nodes.values():
            node.start()
        self._apply_manifests()
        for name in self.nodes:
            self.wait_for(f"{name} is Ready", lambda name=name: self._is_ready(name, started), START_SECONDS)  # type: ignore[misc]
            quantity = {"nvidia.com/gpu": GPUS}
            self.client.patch(
                "Node", name, {"status": {"capacity": quantity, "allocatable": quantity}}, subresource="status"
            )
        self.wait_for(
            "the training operator is available", lambda: training_operator.is_available(self.client), START_SECONDS
        )

    def _link_programs(self) -> None:
        self.layout.bin.mkdir()
        for program in PROGRAMS:
            (self.layout.bin / program).symlink_to(CACHE / "bin" / "kubernetes")
        (self.layout.bin / "helm").symlink_to(CACHE / "bin" / "helm")

    def _apply_manifests(self) -> None:
        for manifest in (*control_plane.DNS_ACCESS, *hostpy.manifests(), *training_operator.manifests(MANIFESTS)):
            self.client.apply(manifest)

    def _is_ready(self, name: str, started: datetime.datetime) -> bool:
        """Ready by a kubelet that has been heard of since; for some seconds a dead one is called Ready, too."""
        lease = self.client.get("Lease", name, "kube-node-lease")
        if not lease or datetime.datetime.fromisoformat(lease["spec"]["renewTime"]) < started:
            return False
        node = self.client.get("Node", name)
        return is_true(node, "Ready") and not (node or {})["spec"].get("taints")

    def _kill_all(self) -> None:
        itself = self.processes.pid(GUARD) == os.getpid()
        self.processes.kill(name for name in self.processes.recorded() if not (name == GUARD and itself))
        self.s3.kill()

    def _start_guard(self, pid: int) -> None:
        command = [sys.executable, "-m", "tests.cluster", GUARD, str(pid), "--state", str(self.layout.state)]
        self.processes.start(GUARD, command, {"PYTHONPATH": str(ROOT)})

    def _describe(self) -> str:
        return f"{describe(self.client)}\n{self._describe_processes()}"

    def _describe_processes(self) -> str:
        """Those that have ended, with their last words."""
        ended = [name for name in self.processes.recorded() if self.processes.pid(name) is None]
        return "\n".join(f"{name} has ended: {self.processes.log_tail(name)}" for name in ended)
