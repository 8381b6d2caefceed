"""What a test cluster needs of this machine, and what one leaves on it while it is up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cluster.images import AUTHORITIES, ROOT
from tests.cluster.layout import Layout
from tests.cluster.node import controllers, hierarchies

CACHE = Path(os.environ.get("SFTJOB_CACHE") or Path.home() / ".cache" / "sftjob")
BUILT = ("kubernetes", "training-operator", "helm", "versitygw")
MANIFESTS = CACHE / "share" / "training-operator.yaml"
COMMANDS = ("containerd", "ctr", "runc", "ip", "nft", "conntrack", "nsenter", "unshare")
FILES = ("/usr/lib/cni/bridge", "/bin/busybox", "/bin/bash-static", str(AUTHORITIES))
NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "true"]


def what_is_missing() -> str | None:
    """Why there can be no cluster here, in a sentence; None where there can."""
    if os.geteuid() != 0:
        return "a cluster's nodes are made of namespaces, bridges and cgroups, which only root can make"
    absent = [path for path in (*(CACHE / "bin" / name for name in BUILT), MANIFESTS) if not path.exists()]
    if absent:
        return f"{absent[0]} is not there: tests/tools/build_tools.sh builds it"
    absent_commands = [command for command in COMMANDS if not shutil.which(command)]
    absent_commands += [path for path in FILES if not Path(path).exists()]
    if absent_commands:
        return f"{absent_commands[0]} is not there: scripts/tools.sh installs it"
    if hidden := [path for path in (ROOT, Path(sys.prefix)) if path.is_relative_to("/tmp")]:
        return f"pods run this checkout's Python and have a /tmp of their own, which hides {hidden[0]}"
    if "memory" not in [path.name for path in controllers()]:
        return "this machine has no cgroup v1 hierarchies, which the cluster's nodes are made for"
    if subprocess.run(NAMESPACES, capture_output=True).returncode:
        return "no namespaces can be made here (unshare is not permitted)"
    return None


def traces(layout: Layout) -> list[str]:
    """Everything on the machine that bears the cluster's name, address or state folder; empty once it is down."""
    listings = {
        "interface": _lines(["ip", "-oneline", "link", "show"]),
        "address": _lines(["ip", "-oneline", "address", "show"]),
        "route": _lines(["ip", "route", "show", "table", "all"]),
        "mount": Path("/proc/self/mounts").read_text().splitlines(),
        "cgroup": [str(path) for hierarchy in hierarchies() for path in hierarchy.glob("*")],
        "process": _command_lines(),
        "folder": [str(layout.state)] if layout.state.exists() else [],
    }
    marks = (f"{layout.name}-", f"{layout.name}:", f"{layout.name} ", f"{layout.network}.", f"{layout.state}")
    return [
        f"{kind} {line}" for kind, lines in listings.items() for line in lines if any(mark in line for mark in marks)
    ]


def _lines(command: list[str]) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _command_lines() -> list[str]:
    """Of every process but this one and those that started it, whose arguments may name the cluster's folder."""
    ours = _ancestors(os.getpid())
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text and int(path.parent.name) not in ours:
            found.append(f"{path.parent.name} {text}")
    return found


def _ancestors(pid: int) -> set[int]:
    found = set()
    while pid > 1:
        found.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found
