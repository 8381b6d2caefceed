"""The cluster as tests use it: `kubectl`, `helm`, objects by kind and name, waiting, namespaces, S3, and lost nodes."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from tests.cluster import hostpy, training_operator
from tests.cluster.bring_up import Bed
from tests.cluster.client import ApiError, Client, Manifest
from tests.cluster.images import BUSYBOX
from tests.s3 import S3Server

T = TypeVar("T")
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
RESTRICTED_POD = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED_CONTAINER = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""The security contexts of a pod and a container that a restricted namespace admits."""


class Cluster:
    """One cluster, and its administrator."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self._namespaces = itertools.count(1)

    @property
    def kubeconfig(self) -> Path:
        return self._bed.layout.kubeconfig

    @property
    def client(self) -> Client:
        """For what is not here: `client.request("GET", path)`."""
        return self._bed.client

    @property
    def s3(self) -> S3Server:
        """An S3 server; its endpoint is the same from a pod and from here."""
        return self._bed.s3

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._bed.nodes)

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:
        """What it prints; what it complains of as well where it may fail."""
        return self._run("kubectl", arguments, input, check)

    def helm(self, *arguments: str, input: str | None = None, check: bool = True) -> str:
        """What Helm prints; what it complains of as well where it may fail."""
        return self._run("helm", arguments, input, check)

    def get(self, kind: str, name: str, namespace: str | None = None) -> Manifest | None:
        """The object, or None."""
        return self.client.get(kind, name, namespace)

    def list(self, kind: str, namespace: str | None = None, labels: str = "") -> Iterable[Manifest]:
        """The objects of a kind; `labels` is a selector as kubectl has it."""
        return self.client.list(kind, namespace, labels)

    def apply(self, manifests: Manifest | Iterable[Manifest]) -> None:
        """Server-side apply. A refusal is an ApiError with the API server's message."""
        for manifest in [manifests] if isinstance(manifests, dict) else manifests:
            self.client.apply(manifest)

    def patch(self, kind: str, name: str, patch: Manifest, namespace: str | None = None) -> Manifest:
        """A JSON merge patch."""
        return self.client.patch(kind, name, patch, namespace)

    def delete(self, kind: str, name: str, namespace: str | None = None) -> None:
        """Ask for its deletion, of what it owns first; returns at once."""
        self.client.delete(kind, name, namespace)

    def wait_for(self, what: str, probe: Callable[[], T | Literal[False] | None], seconds: float) -> T:
        """What the probe answers as soon as that is not None or False; else fails with `what`, pods and warnings."""
        return self._bed.wait_for(what, probe, seconds)

    def wait(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        condition: Callable[[Manifest | None], object],
        seconds: float,
    ) -> Manifest:
        """The object as soon as the condition holds for it; {} where that is that there is none."""

        def probe() -> Manifest | None:
            found = self.get(kind, name, namespace)
            return (found or {}) if condition(found) else None

        return self.wait_for(f"{kind} {namespace or ''}/{name} is as expected", probe, seconds)

    def new_namespace(self, prefix: str, labels: Mapping[str, str] | None = None) -> str:
        """A namespace of its own, ready for pods. It goes with the cluster: tests delete what holds resources."""
        name = f"{prefix}-{next(self._namespaces)}"
        labels = dict(labels or {})
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        self.wait_for(f"{name} has a ServiceAccount", lambda: self.get("ServiceAccount", "default", name), 30)
        if labels.items() >= hostpy.LABEL.items():
            self.wait_for(f"pods in {name} get the runtime hostpy", lambda: self._gets_hostpy(name), 30)
        return name

    def import_image(self, tar: Path) -> None:
        """Put the images of a docker-archive into every node, under the names that they have there."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.import_image(tar), self._bed.nodes.values()))

    def kill_node(self, name: str) -> None:
        """The node loses power. The cluster notices in about 8 s."""
        self._bed.nodes[name].kill()

    def start_node(self, name: str) -> None:
        """The node boots again; returns when it is Ready."""
        self._bed.start_node(name)

    def let_training_operator_start_restricted_workers(self, lets: bool) -> None:
        """With or without what it needs where Pod Security is `restricted` (it has it to begin with)."""
        if lets:
            self.apply(training_operator.configuration())
        else:
            self.delete("ConfigMap", training_operator.CONFIGURATION, training_operator.NAMESPACE)
        training_operator.restart(self.client, f"restricted-workers-{lets}".lower())
        self.wait_for(
            "the training operator is available again", lambda: training_operator.is_available(self.client), 60
        )

    def _gets_hostpy(self, namespace: str) -> bool:
        """A policy is in force some moments after it was made."""
        pod: Manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "probe", "namespace": namespace},
            "spec": {
                "securityContext": RESTRICTED_POD,
                "containers": [{"name": "probe", "image": BUSYBOX, "securityContext": RESTRICTED_CONTAINER}],
            },
        }
        try:
            admitted = self.client.create(pod, dry_run=True)
        except ApiError:
            return False
        return bool(admitted["spec"].get("runtimeClassName") == hostpy.HANDLER)

    def _run(self, program: str, arguments: tuple[str, ...], input: str | None, check: bool) -> str:
        helm = self._bed.layout.state / "helm"
        homes = {f"HELM_{name}_HOME": str(helm / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [self._bed.layout.bin / program, *arguments],
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig), **homes},
            input=input,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise AssertionError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}\n{done.stdout}")
        return done.stdout if check else done.stdout + done.stderr
