"""Every name, address and path of one test cluster, derived from its slot and its state folder. Starts nothing.

A slot is one of six places on this machine: its number is in the bridge, the veths, the cgroups and the addresses, so
that several clusters can be up at once.

    slot 2:  bridge sftjob2   10.252.0.1      node-1: veth and cgroup sftjob2-node-1, 10.252.0.11
             etcd             127.252.0.1     its pods 10.252.17.0/24, services 10.252.128.0/17
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SLOTS = range(6)


@dataclass(frozen=True)
class NodeLayout:
    """One node: what it is called inside the cluster, and on the machine."""

    name: str
    on_machine: str
    """Of its veth on the bridge and its cgroups. The name of an interface has 15 characters at most."""
    address: str
    pods: str
    state: Path

    @property
    def network_namespace(self) -> Path:
        """Not by `ip netns`, which leaves a mount of /run/netns behind for ever."""
        return self.state / "network-namespace"


@dataclass(frozen=True)
class Layout:
    """Where one test cluster is."""

    slot: int
    state: Path

    @property
    def name(self) -> str:
        return f"sftjob{self.slot}"

    @property
    def network(self) -> str:
        """The first half of all its addresses."""
        return f"10.{250 + self.slot}"

    @property
    def host(self) -> str:
        """The bridge's address: API server, DNS and S3, for the nodes, the pods and this machine alike."""
        return f"{self.network}.0.1"

    @property
    def loopback(self) -> str:
        """For what only the control plane talks to."""
        return f"127.{250 + self.slot}.0.1"

    @property
    def services(self) -> str:
        return f"{self.network}.128.0/17"

    @property
    def api_service(self) -> str:
        """The address of `kubernetes.default`: the first of the range, as always."""
        return f"{self.network}.128.1"

    @property
    def pods(self) -> str:
        return f"{self.network}.16.0/20"

    @property
    def api_server(self) -> str:
        return f"https://{self.host}:6443"

    @cached_property
    def nodes(self) -> tuple[NodeLayout, ...]:
        return tuple(
            NodeLayout(
                name=f"node-{number}",
                on_machine=f"{self.name}-node-{number}",
                address=f"{self.network}.0.{10 + number}",
                pods=f"{self.network}.{16 + number}.0/24",
                state=self.state / f"node-{number}",
            )
            for number in (1, 2)
        )

    @property
    def bin(self) -> Path:
        """Links, named after the programs, to what tests/tools/build_tools.sh built."""
        return self.state / "bin"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.state / "kubeconfig"

    def kubeconfig_of(self, user: str) -> Path:
        return self.state / "kubeconfigs" / user
