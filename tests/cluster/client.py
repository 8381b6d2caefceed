"""A small client of the API server: any kind by its name. In this process, as kubectl takes half a second a call."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

from tests.cluster.layout import Layout

Manifest = dict[str, Any]

DISCOVERY = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
FIELD_MANAGER = "test"


class ApiError(Exception):
    """The API server refuses; the message is its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UnknownKind(LookupError):
    """No such kind is served (yet)."""


@dataclass(frozen=True)
class Resource:
    """What a kind is called in paths."""

    group_version: str
    plural: str
    namespaced: bool

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        root = f"/api/{self.group_version}" if "/" not in self.group_version else f"/apis/{self.group_version}"
        where = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{root}{where}/{self.plural}" + (f"/{name}" if name else "")


class Client:
    """One administrator's connection."""

    def __init__(self, server: str, ca: Path, certificate: Path, key: Path) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        context.load_cert_chain(certificate, key)
        self._server = server
        self._pool = urllib3.PoolManager(ssl_context=context, retries=False, timeout=30.0)
        self._resources: dict[str, Resource] = {}

    @classmethod
    def of(cls, layout: Layout) -> Client:
        pki = layout.pki
        return cls(layout.api_server, pki / "ca.crt", pki / "admin.crt", pki / "admin.key")

    def close(self) -> None:
        self._pool.clear()

    def is_ready(self) -> bool:
        try:
            return self._pool.request("GET", f"{self._server}/readyz").status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def request(
        self, method: str, path: str, body: object = None, *, content: str = "application/json", accept: str = ""
    ) -> Any:
        """The answer, parsed if it is JSON; an ApiError if it is a refusal."""
        headers = {"Accept": accept or "application/json", "Content-Type": content}
        encoded = None if body is None else json.dumps(body)
        answer = self._pool.request(method, self._server + path, body=encoded, headers=headers)
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        data: Any = json.loads(answer.data) if is_json else answer.data.decode(errors="replace")
        if answer.status >= 400:
            raise ApiError(answer.status, data["message"] if is_json else data)
        return data

    def resource(self, kind: str, group_version: str = "") -> Resource:
        """A kind by its name, its plural or a short name; where several groups have it, core's comes first."""
        key = f"{group_version}:{kind.lower()}"
        if key not in self._resources:
            self._resources = self._discover()
        if key not in self._resources:
            raise UnknownKind(f"the API server has no {kind} {group_version}".strip())
        return self._resources[key]

    def get(self, kind: str, name: str, namespace: str | None = None) -> Manifest | None:
        return self._or_none("GET", self.resource(kind).path(namespace, name))

    def list(self, kind: str, namespace: str | None = None, labels: str = "") -> list[Manifest]:
        query = f"?{urlencode({'labelSelector': labels})}" if labels else ""
        items: list[Manifest] = self.request("GET", self.resource(kind).path(namespace) + query)["items"]
        return items

    def create(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        metadata = manifest["metadata"]
        resource = self.resource(manifest["kind"], manifest["apiVersion"])
        path = resource.path(metadata.get("namespace", "default")) + ("?dryRun=All" if dry_run else "")
        created: Manifest = self.request("POST", path, manifest)
        return created

    def apply(self, manifest: Manifest) -> Manifest:
        """Server-side, as `kubectl apply --server-side --force-conflicts`."""
        metadata = manifest["metadata"]
        resource = self.resource(manifest["kind"], manifest["apiVersion"])
        path = resource.path(metadata.get("namespace", "default"), metadata["name"])
        query = urlencode({"fieldManager": FIELD_MANAGER, "force": "true"})
        applied: Manifest = self.request("PATCH", f"{path}?{query}", manifest, content="application/apply-patch+yaml")
        return applied

    def patch(
        self, kind: str, name: str, patch: Manifest, namespace: str | None = None, *, subresource: str = ""
    ) -> Manifest:
        """A JSON merge patch."""
        path = self.resource(kind).path(namespace, name) + (f"/{subresource}" if subresource else "")
        patched: Manifest = self.request("PATCH", path, patch, content="application/merge-patch+json")
        return patched

    def delete(self, kind: str, name: str, namespace: str | None = None) -> None:
        """In the foreground: it is there until what it owns is gone. Nothing happens where it is not there."""
        body = {"propagationPolicy": "Foreground"}
        self._or_none("DELETE", self.resource(kind).path(namespace, name), body)

    def _or_none(self, method: str, path: str, body: object = None) -> Manifest | None:
        try:
            answer: Manifest = self.request(method, path, body)
        except ApiError as refusal:
            if refusal.status == 404:
                return None
            raise
        return answer

    def _discover(self) -> dict[str, Resource]:
        found: dict[str, Resource] = {}
        for root in ("/api", "/apis"):
            for names, resource in _resources(self.request("GET", root, accept=DISCOVERY)):
                for name in names:
                    found.setdefault(f":{name}", resource)
                    found[f"{resource.group_version}:{name}"] = resource
        return found


def _resources(discovery: Manifest) -> Iterator[tuple[set[str], Resource]]:
    for group in discovery["items"]:
        prefix = f"{name}/" if (name := group["metadata"].get("name")) else ""
        for version in group["versions"]:
            for entry in version["resources"]:
                kind = entry.get("responseKind", {}).get("kind", "")
                names = {kind.lower(), entry["resource"], *entry.get("shortNames", [])}
                resource = Resource(prefix + version["version"], entry["resource"], entry["scope"] == "Namespaced")
                yield names, resource
