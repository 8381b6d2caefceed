"""The only module of `sft` that talks to a cluster: reads SFTJobs, pods and logs, by the user's own kubeconfig."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft_api import labels
from sft_api.job import API_VERSION, JOB_NAME_PATTERN
from sft_api.status import Attempt, SFTJobStatus

JOBS = f"/apis/{API_VERSION}"
NO_ANSWER = 1
"""Exit code where the cluster cannot be asked, refuses, or has not what was asked for."""
PAGE = 500
"""Objects asked for at a time."""
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where a pod finds its own namespace."""


class ClusterError(Exception):
    """The cluster cannot be asked, or refuses, or has not what was asked for: one sentence for a person."""


class NotThere(ClusterError):
    """There is no such object."""


class NotStarted(ClusterError):
    """A pod's container has not begun to write a log."""


@dataclass(frozen=True)
class Access:
    """Which cluster and namespace, as the user said it; unset is as kubectl has it."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None


@dataclass(frozen=True)
class ClusterJob:
    """An SFTJob as a cluster has it. Its spec is as stored: another version of the API may have written it."""

    name: str
    namespace: str
    created: datetime
    generation: int
    deleting: bool
    spec: Mapping[str, Any]
    status: SFTJobStatus
    raw_status: Mapping[str, Any]


@dataclass(frozen=True)
class JobPod:
    """A pod of a job, as far as its log is concerned."""

    name: str
    namespace: str
    rank: int
    """Its place in the gang: 0 is the master's; workers follow."""
    created: str
    phase: str


class Cluster:
    """One cluster, seen with the rights of its user."""

    def __init__(self, client: Any, namespace: str, place: str):
        """`namespace` is the one that is meant where none is said; `place` names the cluster in messages."""
        self._client, self.namespace, self._place = client, namespace, place

    def jobs(self, namespace: str | None) -> list[ClusterJob]:
        """Those of a namespace, or of all, by namespace and name."""
        found = [job_of(item) for item in self._list(f"{JOBS}{within(namespace)}/sftjobs")]
        return sorted(found, key=lambda job: (job.namespace, job.name))

    def job(self, name: str) -> ClusterJob:
        """Raises ClusterError with the names that do exist where there is none of this name."""
        if not re.fullmatch(JOB_NAME_PATTERN, name):
            raise ClusterError(
                f"{name!r} is no name of an SFTJob: those are a lower-case letter, then letters, digits and hyphens"
            )
        try:
            return job_of(json.loads(self._read(f"{JOBS}{within(self.namespace)}/sftjobs/{name}", {})))
        except NotThere as error:
            others = ", ".join(job.name for job in self.jobs(self.namespace)) or "none"
            raise NotThere(f"there is no SFTJob {name} in namespace {self.namespace}; there: {others}") from error

    def pods(self, job: ClusterJob, role: str, attempt: int | None = None) -> list[JobPod]:
        """The job's pods of this role, and of this attempt, oldest first."""
        wanted = {labels.JOB: job.name, labels.ROLE: role}
        wanted |= {labels.ATTEMPT: str(attempt)} if attempt is not None else {}
        selector = ",".join(f"{key}={value}" for key, value in wanted.items())
        items = self._list(f"/api/v1{within(job.namespace)}/pods", labelSelector=selector)
        return sorted(map(pod_of, items), key=lambda pod: (pod.created, pod.rank))

    def is_pending(self, pod: JobPod) -> bool:
        """Whether the pod has still to start. Raises NotThere where it is gone."""
        found = pod_of(json.loads(self._read(f"/api/v1{within(pod.namespace)}/pods/{pod.name}", {})))
        return found.phase == "Pending"

    def log(self, pod: JobPod, container: str, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Lines of the pod's log as they come. Raises NotStarted where there is none yet."""
        query: dict[str, object] = {"container": container}
        query |= {"follow": "true"} if follow else {}
        query |= {"tailLines": tail} if tail is not None else {}
        path = f"/api/v1{within(pod.namespace)}/pods/{pod.name}/log"
        with self._told():
            response = self._open(path, query, None if follow else READ_SECONDS)
            yield from lines_of(response.stream(1 << 16))

    def _list(self, path: str, **query: object) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        more: dict[str, object] = {"limit": PAGE}
        while more:
            answer = json.loads(self._read(path, query | more))
            found.extend(answer["items"])
            rest = answer.get("metadata", {}).get("continue")
            more = {"limit": PAGE, "continue": rest} if rest else {}
        return found

    def _read(self, path: str, query: dict[str, object]) -> bytes:
        with self._told():
            return bytes(self._open(path, query, READ_SECONDS).data)

    def _open(self, path: str, query: dict[str, object], read_seconds: float | None) -> Any:
        """The successful answer to a GET, its body still to be read."""
        request = self._client.param_serialize(
            "GET", path, query_params=list(query.items()), header_params={}, auth_settings=["BearerToken"]
        )
        response = self._client.call_api(*request, _request_timeout=(CONNECT_SECONDS, read_seconds)).response
        if not 200 <= response.status < 300:
            raise refusal(response.status, response.data.decode(errors="replace"), self._place)
        return response

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong on the way to the cluster, as a ClusterError."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (HTTPError, ApiException, OSError) as error:
            raise ClusterError(f"{self._place} does not answer: {cause_of(error)}") from error


@contextmanager
def connect(access: Access) -> Iterator[Cluster]:
    """The cluster that the user means. Nothing is asked of it yet."""
    try:
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration
    except ModuleNotFoundError as error:
        raise ClusterError("this needs the Kubernetes client: pip install 'sftjob[operator]'") from error

    settings: Any = Configuration()
    settings.retries = False  # a cluster that is away is told at once: who asked is there to ask again
    in_pod = access.kubeconfig is None and access.context is None and "KUBERNETES_SERVICE_HOST" in os.environ
    try:
        if in_pod and not has_kubeconfig():
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
            namespace = OWN_NAMESPACE.read_text().strip()
        else:
            config.load_kube_config(access.kubeconfig, access.context, client_configuration=settings)  # type: ignore[no-untyped-call]
            namespace = namespace_of(access)
    except (config.ConfigException, OSError) as error:
        where = access.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
        advice = "give --kubeconfig PATH and --context NAME, or set KUBECONFIG"
        raise ClusterError(f"no cluster to ask: {where}: {one_line(error)}; {advice}") from error
    with ApiClient(configuration=settings) as client:
        yield Cluster(client, access.namespace or namespace, f"the cluster at {settings.host}")


def has_kubeconfig() -> bool:
    return "KUBECONFIG" in os.environ or Path("~/.kube/config").expanduser().exists()


def namespace_of(access: Access) -> str:
    """The namespace of the context."""
    from kubernetes import config

    contexts, active = config.list_kube_config_contexts(access.kubeconfig)  # type: ignore[no-untyped-call]
    chosen = next((found for found in contexts if found["name"] == access.context), active)
    return str(chosen["context"].get("namespace") or "default")


def within(namespace: str | None) -> str:
    return f"/namespaces/{namespace}" if namespace else ""


def refusal(status: int, body: str, place: str) -> ClusterError:
    """What an answer that is no success means to a person; the API server's own words where it has some."""
    try:
        words = one_line(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        words = one_line(body)
    if status == 401:
        return ClusterError(f"{place} does not know you (401): log in, or give another --context")
    if status == 403:
        return ClusterError(f"you may not read this: {words}")
    if status == 404 and words.startswith("404 page not found"):
        return ClusterError(f"{place} has no SFTJobs: the chart sftjob-operator is not installed there")
    kind = {400: NotStarted, 404: NotThere}.get(status)
    return kind(words) if kind else ClusterError(f"{place} refuses: {words} ({status})")


def cause_of(error: BaseException) -> str:
    """The innermost cause, without the library's wrapping."""
    while inner := error.__cause__ or next((part for part in error.args if isinstance(part, BaseException)), None):
        error = inner
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def job_of(item: Mapping[str, Any]) -> ClusterJob:
    metadata, raw_status = item["metadata"], item.get("status") or {}
    try:
        status = SFTJobStatus.model_validate(raw_status)
    except ValidationError as error:
        where = ".".join(str(step) for step in error.errors()[0]["loc"])
        raise ClusterError(
            f"the status of SFTJob {metadata['name']} is of another version of sftjob than this `sft` (status.{where})"
        ) from error
    return ClusterJob(
        name=metadata["name"],
        namespace=metadata["namespace"],
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        generation=metadata.get("generation", 0),
        deleting="deletionTimestamp" in metadata,
        spec=item.get("spec") or {},
        status=status,
        raw_status=raw_status,
    )


def number_of(attempt: Attempt) -> int:
    """The attempt's number, from the name of its objects."""
    return int(attempt.name.rpartition("-")[2])


def pod_of(item: Mapping[str, Any]) -> JobPod:
    metadata = item["metadata"]
    has = metadata.get("labels") or {}
    index = int(has.get("training.kubeflow.org/replica-index", "0"))
    is_worker = has.get("training.kubeflow.org/replica-type") == "worker"
    return JobPod(
        name=metadata["name"],
        namespace=metadata["namespace"],
        rank=index + 1 if is_worker else 0,
        created=metadata["creationTimestamp"],
        phase=(item.get("status") or {}).get("phase", "Pending"),
    )


def lines_of(chunks: Iterator[bytes]) -> Iterator[str]:
    """Whole lines, without their ends, as soon as they are there; a last one that has no end too."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
