"""Waiting for something to become true in the cluster, and saying what is there instead when it does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Literal, TypeVar

from tests.cluster.client import Client, Manifest

T = TypeVar("T")
POLL_SECONDS = 0.1
NUM_EVENTS = 20


def wait_for(
    what: str, probe: Callable[[], T | Literal[False] | None], seconds: float, describe: Callable[[], str]
) -> T:
    """What the probe answers as soon as that is not None or False."""
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s\n{describe()}")
        Event().wait(POLL_SECONDS)


def describe(client: Client) -> str:
    """The cluster's nodes and pods and the newest warnings, a line each."""
    nodes = [_node_line(node) for node in client.list("Node")]
    pods = [_pod_line(pod) for pod in client.list("Pod")]
    warnings = [event for event in client.list("Event") if event.get("type") == "Warning"]
    warnings.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime")))
    return "\n".join(["Nodes:", *nodes, "Pods:", *pods, "Warnings:", *map(_event_line, warnings[-NUM_EVENTS:])])


def is_true(manifest: Manifest | None, condition: str) -> bool:
    """Whether an object has a condition with the status True."""
    conditions = ((manifest or {}).get("status") or {}).get("conditions") or []
    return any(entry["type"] == condition and entry["status"] == "True" for entry in conditions)


def _node_line(node: Manifest) -> str:
    ready = "Ready" if is_true(node, "Ready") else "not Ready"
    taints = ", ".join(f"{taint['key']}:{taint['effect']}" for taint in node["spec"].get("taints", []))
    return f"  {node['metadata']['name']}: {ready} {taints}"


def _pod_line(pod: Manifest) -> str:
    metadata, spec, status = pod["metadata"], pod["spec"], pod["status"]
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    states = [f"{container['name']} {_state(container)}" for container in containers]
    unmet = [
        f"{entry['type']} {entry.get('reason', '')}: {entry.get('message', '')}"
        for entry in status.get("conditions", [])
        if entry["status"] != "True" and entry["type"] in ("PodScheduled", "PodReadyToStartContainers")
    ]
    terminating = ["terminating"] if "deletionTimestamp" in metadata else []
    where = f"{metadata['namespace']}/{metadata['name']} on {spec.get('nodeName', 'no node')}"
    return f"  {where}: {'; '.join([status.get('phase', ''), *terminating, *states, *unmet])}"


def _state(container: Manifest) -> str:
    [(name, details)] = container.get("state", {}).items() or [("unknown", {})]
    code = f" {details['exitCode']}" if "exitCode" in details else ""
    return " ".join([name + code, details.get("reason", ""), details.get("message", "")[-300:]]).strip()


def _event_line(event: Manifest) -> str:
    about = event["involvedObject"]
    where = f"{about.get('namespace', '')}/{about['kind']}/{about['name']}"
    return f"  {where}: {event.get('reason')}: {event.get('message', '')[-500:]}"
