"""The only module that talks to the API server, kopf's watches aside, and to the trainer: dictionaries in and out.

Each call has a time-out. ClusterError is the one error: of a refusal it has the HTTP status, of no answer none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from pydantic import ValidationError

from sft_api import labels
from sft_api.job import API_VERSION
from sft_api.report import TrainerReport
from sft_operator.observed import Manifest, ObjectRef, Trouble
from sft_operator.official_client import api_client
from sft_operator.pods import CONTAINER
from sft_operator.views import Raw, condition, troubles

CALL_SECONDS = 20.0
PROGRESS_SECONDS = 2.0
PROGRESS_BYTES = 1 << 16
PAGE = 500
LOG_LINES = 20
LOG_BYTES = 1 << 16
APPLY = "application/apply-patch+yaml"
IN_FOREGROUND = frozenset({"PyTorchJob", "Job"})
"""Kinds whose own absence is to mean that their pods are gone."""


class ClusterError(Exception):
    """The API server refuses, in its own words, or does not answer."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Resource:
    """What a kind is called in paths."""

    group_version: str
    plural: str

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        root = "apis" if "/" in self.group_version else "api"
        where = f"/namespaces/{namespace}" if namespace else ""
        return f"/{root}/{self.group_version}{where}/{self.plural}" + (f"/{name}" if name else "")


@dataclass(frozen=True)
class Page:
    """A part of a list. All pages of a list show the same moment."""

    items: Sequence[Raw]
    version: int


RESOURCES: Mapping[str, Resource] = {
    "SFTJob": Resource(API_VERSION, "sftjobs"),
    "PyTorchJob": Resource("kubeflow.org/v1", "pytorchjobs"),
    "Job": Resource("batch/v1", "jobs"),
    "Pod": Resource("v1", "pods"),
    "ConfigMap": Resource("v1", "configmaps"),
    "PodGroup": Resource("scheduling.k8s.io/v1beta1", "podgroups"),
    "Event": Resource("v1", "events"),
    "Node": Resource("v1", "nodes"),
    "Lease": Resource("coordination.k8s.io/v1", "leases"),
    "MutatingAdmissionPolicyBinding": Resource("admissionregistration.k8s.io/v1", "mutatingadmissionpolicybindings"),
}


@asynccontextmanager
async def connected(kubeconfig: str | None = None) -> AsyncIterator[Cluster]:
    """The cluster that this process may talk to: its own by its service account, else that of a kubeconfig."""
    api = await api_client(kubeconfig)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PROGRESS_SECONDS)) as pods:
            yield Cluster(api, pods)
    finally:
        await api.close()


class Cluster:
    """One API server, and the trainers in its pods."""

    def __init__(self, api: Any, pods: aiohttp.ClientSession) -> None:
        self._api = api
        self._pods = pods

    # ── objects ────────────────────────────────────────────────────────────────────────────────────────────────

    async def get(self, kind: str, namespace: str | None, name: str) -> Raw | None:
        """The object; none where there is none."""
        try:
            found: Raw = await self._ask("GET", RESOURCES[kind].path(namespace, name))
        except ClusterError as error:
            if error.status == 404:
                return None
            raise
        return found

    async def pages(self, kind: str, namespace: str | None, selector: str = "") -> AsyncIterator[Page]:
        """Every object of a kind."""
        query = {"limit": str(PAGE)} | ({"labelSelector": selector} if selector else {})
        while True:
            page = await self._ask("GET", RESOURCES[kind].path(namespace), query)
            yield Page(page["items"], int(page["metadata"]["resourceVersion"]))
            if not (more := page["metadata"].get("continue")):
                return
            query["continue"] = more

    async def create(self, manifest: Manifest) -> Raw:
        """Make the object. There must be none of its name: 409 where there is."""
        path = RESOURCES[manifest["kind"]].path(manifest["metadata"]["namespace"])
        made: Raw = await self._ask("POST", path, {"fieldManager": labels.MANAGER}, manifest)
        return made

    async def replace(self, manifest: Manifest) -> Raw:
        """Write the object as it is here. 409 where it is no longer of this resourceVersion."""
        metadata = manifest["metadata"]
        path = RESOURCES[manifest["kind"]].path(metadata["namespace"], metadata["name"])
        written: Raw = await self._ask("PUT", path, {"fieldManager": labels.MANAGER}, manifest)
        return written

    async def apply(self, manifest: Manifest) -> Raw:
        """Server-side apply of a complete manifest: what it names is ours."""
        metadata = manifest["metadata"]
        return await self._apply(RESOURCES[manifest["kind"]].path(metadata["namespace"], metadata["name"]), manifest)

    async def apply_status(self, raw: Raw, status: Mapping[str, Any]) -> Raw:
        """The status of an SFTJob, if the object is still what `raw` is: 409 where it has changed."""
        seen = raw["metadata"]
        metadata = {name: seen[name] for name in ("name", "namespace", "resourceVersion")}
        body = {"apiVersion": API_VERSION, "kind": "SFTJob", "metadata": metadata, "status": status}
        path = RESOURCES["SFTJob"].path(seen["namespace"], seen["name"])
        try:
            return await self._apply(f"{path}/status", body)
        except ClusterError as error:
            if error.status == 500 and "field not declared in schema" in str(error):
                older = (
                    "the CRD in the cluster is older than this operator and knows less of the status: upgrade it first"
                )
                raise ClusterError(500, f"{older} ({error})") from error
            raise

    async def delete(self, namespace: str, ref: ObjectRef) -> Raw | None:
        """Have the object go; its last state where it goes later. None where it, and not a namesake, is gone."""
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        options["propagationPolicy"] = "Foreground" if ref.kind in IN_FOREGROUND else "Background"
        if ref.uid:
            options["preconditions"] = {"uid": ref.uid}
        if ref.force:
            options["gracePeriodSeconds"] = 0
        try:
            answer = await self._ask("DELETE", RESOURCES[ref.kind].path(namespace, ref.name), body=options)
        except ClusterError as error:
            if error.status in (404, 409):
                return None
            raise
        return answer if (answer.get("metadata") or {}).get("deletionTimestamp") else None

    # ── what pods and nodes tell ───────────────────────────────────────────────────────────────────────────────

    async def log_tail(self, namespace: str, pod: str) -> str:
        """The last lines of its main container; nothing where there are none to be had."""
        query = {"container": CONTAINER, "tailLines": str(LOG_LINES), "limitBytes": str(LOG_BYTES)}
        try:
            data = await self._call("GET", f"{RESOURCES['Pod'].path(namespace, pod)}/log", query)
        except ClusterError:
            return ""
        return data.decode(errors="replace")

    async def warnings(self, namespace: str, uid: str) -> tuple[Trouble, ...]:
        """What Warning events say about this object."""
        query = {"fieldSelector": f"involvedObject.uid={uid},type=Warning", "limit": str(PAGE)}
        answer = await self._ask("GET", RESOURCES["Event"].path(namespace), query)
        return troubles(answer["items"])

    async def node_is_lost(self, name: str) -> bool:
        """Whether the control plane has given the node up. Where we may not know, it has not."""
        try:
            node = await self.get("Node", None, name)
        except ClusterError as error:
            if error.status == 403:
                return False
            raise
        return node is None or condition(node, "Ready").get("status") != "True"

    async def progress(self, address: str) -> TrainerReport | None:
        """What the trainer in the pod of this address answers; none where that is no report."""
        host = f"[{address}]" if ":" in address else address
        try:
            url = f"http://{host}:{labels.METRICS_PORT}/progress"
            async with self._pods.get(url, allow_redirects=False) as answer:
                body = await self._read(answer)
            return TrainerReport.model_validate_json(body) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValidationError):
            return None

    @staticmethod
    async def _read(answer: aiohttp.ClientResponse) -> bytes:
        """The body, cut where it is longer than a report can be: it is a user's container that answers."""
        body = bytearray()
        async for chunk in answer.content.iter_chunked(PROGRESS_BYTES):
            body += chunk
            if len(body) > PROGRESS_BYTES:
                break
        return bytes(body[:PROGRESS_BYTES])

    # ── what is served ─────────────────────────────────────────────────────────────────────────────────────────

    async def groups(self) -> frozenset[str]:
        """The API groups that are served."""
        return frozenset(group["name"] for group in (await self._ask("GET", "/apis"))["groups"])

    async def serves(self, kind: str) -> bool:
        """Whether objects of this kind, in the version that we know, can be had."""
        resource = RESOURCES[kind]
        try:
            answer = await self._ask("GET", f"/apis/{resource.group_version}")
        except ClusterError as error:
            if error.status == 404:
                return False
            raise
        return any(found["name"] == resource.plural for found in answer["resources"])

    # ── within ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _apply(self, path: str, body: Mapping[str, Any]) -> Raw:
        query = {"fieldManager": labels.MANAGER, "force": "true"}
        applied: Raw = await self._ask("PATCH", path, query, body, content_type=APPLY)
        return applied

    async def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        return json.loads(await self._call(method, path, query, body, content_type))

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        """The one way out. Raises ClusterError."""
        headers = {"Accept": "application/json", "Content-Type": content_type}
        parameters: Sequence[tuple[str, str]] = list((query or {}).items())
        try:
            async with asyncio.timeout(CALL_SECONDS):
                request = await self._api.param_serialize(
                    method,
                    path,
                    query_params=parameters,
                    header_params=headers,
                    body=body,
                    auth_settings=["BearerToken"],
                )
                answer = await self._api.call_api(*request, _request_timeout=aiohttp.ClientTimeout(total=CALL_SECONDS))
                data: bytes = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(None, f"{method} {path}: no answer from the API server: {error!r}") from error
        if answer.status >= 400:
            raise ClusterError(answer.status, f"{method} {path}: {answer.status}: {words(data)}")
        return data


def words(data: bytes) -> str:
    """What the API server says of a refusal."""
    text = data.decode(errors="replace")
    try:
        status = json.loads(text)
    except ValueError:
        return text[:1024]
    return str(status.get("message", text[:1024])) if isinstance(status, dict) else text[:1024]
