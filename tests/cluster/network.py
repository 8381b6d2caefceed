"""The cluster's network on this machine: a bridge, and for each node a network namespace with a veth on it.

Nothing touches the machine's own interfaces, and no forwarding is switched on outside the nodes' namespaces.
"""

from __future__ import annotations

import subprocess

from tests.cluster.layout import SLOTS, Layout, NodeLayout

GONE = ("Cannot find device", "no mount point specified", "not mounted")
"""How `ip link del` and `umount` say that there is nothing to do."""


def claim_slot() -> int:
    """A free slot. Its bridge is made at once: of two that ask for the same slot, one gets it."""
    for slot in SLOTS:
        made = subprocess.run(["ip", "link", "add", f"sftjob{slot}", "type", "bridge"], capture_output=True, text=True)
        if made.returncode == 0:
            return slot
        if "File exists" not in made.stderr:
            raise RuntimeError(f"no bridge can be made here: {made.stderr.strip()}")
    raise RuntimeError(f"there are {len(SLOTS)} test clusters on this machine already: ip link show type bridge")


def connect(layout: Layout) -> None:
    """The bridge's address, the nodes' namespaces, and every route between host, nodes and pods."""
    _ip(f"addr add {layout.host}/24 dev {layout.name}")
    _ip(f"link set {layout.name} up")
    for node in layout.nodes:
        _add_node(layout, node)
    for node in layout.nodes:
        for other in layout.nodes:
            if other != node:  # the host does not forward: nodes find each other's pods themselves
                _ip(f"route add {other.pods} via {other.address}", node)


def _add_node(layout: Layout, node: NodeLayout) -> None:
    namespace = node.network_namespace
    namespace.parent.mkdir(parents=True, exist_ok=True)
    namespace.touch()
    _run(["unshare", f"--net={namespace}", "sysctl", "-qw", "net.ipv4.ip_forward=1"])
    _ip(f"link add {node.on_machine} type veth peer name eth0 netns {namespace}")
    _ip(f"link set {node.on_machine} master {layout.name} up")
    _ip("link set lo up", node)
    _ip(f"addr add {node.address}/24 dev eth0", node)
    _ip("link set eth0 up", node)
    _ip(f"route add default via {layout.host}", node)
    _ip(f"route add {node.pods} via {node.address}")


def disconnect(layout: Layout) -> None:
    """Remove all of it, or what there is of it. Routes go with the bridge."""
    for node in layout.nodes:
        _run(["umount", str(node.network_namespace)], may_be_gone=True)
        # A namespace ends some time after it was last seen, and the veth with it.
        _ip(f"link del {node.on_machine}", may_be_gone=True)
    _ip(f"link del {layout.name}", may_be_gone=True)


def _ip(arguments: str, inside: NodeLayout | None = None, *, may_be_gone: bool = False) -> None:
    enter = ["nsenter", f"--net={inside.network_namespace}"] if inside else []
    _run([*enter, "ip", *arguments.split()], may_be_gone=may_be_gone)


def _run(command: list[str], *, may_be_gone: bool = False) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    gone = may_be_gone and any(answer in done.stderr for answer in GONE)
    if done.returncode and not gone:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
