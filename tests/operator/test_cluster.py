"""What is asked of the API server and how it answers: against a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from sft_api import labels
from sft_api.report import TrainerReport
from sft_operator import cluster as module
from sft_operator.cluster import Cluster, ClusterError, connected
from sft_operator.observed import ObjectRef, Trouble
from tests.api.jobs import document
from tests.operator.api_server import ApiServer

Ask = Callable[[Cluster], Awaitable[Any]]


def asking(api: ApiServer, ask: Ask) -> Any:
    async def main() -> Any:
        async with connected(api.kubeconfig) as cluster:
            return await ask(cluster)

    return asyncio.run(main())


def refused(api: ApiServer, ask: Ask) -> ClusterError:
    with pytest.raises(ClusterError) as error:
        asking(api, ask)
    return error.value


def config_map(namespace: str, name: str = "lab-run", **data: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": {labels.JOB: "lab"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def sftjob(namespace: str, name: str = "lab") -> dict[str, Any]:
    given = document({})
    given["metadata"] = {"name": name, "namespace": namespace}
    return given


def pytorch_job(namespace: str, name: str = "lab-1") -> dict[str, Any]:
    template = {"spec": {"containers": [{"name": "pytorch", "image": "x"}]}}
    spec = {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}}}
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata, "spec": spec}


# ── objects ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_there_is_none_and_not_an_error(api: ApiServer) -> None:
    assert asking(api, lambda cluster: cluster.get("ConfigMap", api.new_namespace(), "no-such")) is None


def test_creating_what_exists_is_refused_in_the_api_servers_words(api: ApiServer) -> None:
    manifest = config_map(api.new_namespace(), x="1")
    asking(api, lambda cluster: cluster.create(manifest))
    error = refused(api, lambda cluster: cluster.create(manifest))
    assert error.status == 409
    assert str(error).endswith('configmaps "lab-run" already exists')


def test_an_apply_changes_what_it_names_and_is_marked_as_ours(api: ApiServer) -> None:
    namespace = api.new_namespace()

    async def ask(cluster: Cluster) -> Any:
        await cluster.create(config_map(namespace, run="1"))
        return await cluster.apply(config_map(namespace, run="2"))

    applied = asking(api, ask)
    assert applied["data"] == {"run": "2"}
    assert ("sft-operator", "Apply") in [
        (entry["manager"], entry["operation"]) for entry in applied["metadata"]["managedFields"]
    ]


def test_a_list_is_read_page_by_page_and_shows_one_moment(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    namespace = api.new_namespace()

    async def ask(cluster: Cluster) -> Any:
        for number in range(5):
            await cluster.create(config_map(namespace, f"lab-{number}"))
        unlabelled = config_map(namespace, "other")
        del unlabelled["metadata"]["labels"]
        await cluster.create(unlabelled)
        pages = []
        async for page in cluster.pages("ConfigMap", namespace, labels.JOB):
            pages.append(page)
            await cluster.create(config_map(namespace, f"late-{len(pages)}"))
        return pages

    pages = asking(api, ask)
    assert [len(page.items) for page in pages] == [2, 2, 1]
    assert len({page.version for page in pages}) == 1


def test_a_status_is_written_against_the_version_that_was_seen(api: ApiServer) -> None:
    namespace = api.new_namespace()
    api.client.create(sftjob(namespace))

    async def ask(cluster: Cluster) -> Any:
        seen = await cluster.get("SFTJob", namespace, "lab")
        assert seen is not None
        await cluster.apply_status(seen, {"state": "Pending"})
        return await cluster.apply_status(seen, {"state": "Running"})

    error = refused(api, ask)
    assert error.status == 409
    assert (api.client.get("SFTJob", "lab", namespace) or {})["status"]["state"] == "Pending"


def test_a_status_leaves_the_conditions_of_others_and_drops_ours_that_are_not_said_again(api: ApiServer) -> None:
    namespace = api.new_namespace()
    api.client.create(sftjob(namespace))
    theirs = {"type": "Theirs", "status": "True", "reason": "R", "message": "m"}
    theirs["lastTransitionTime"] = "2026-11-24T12:00:00Z"
    ours = theirs | {"type": "Prepared"}
    status = {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": {"name": "lab"}}
    path = f"/apis/sftjob.dev/v1alpha1/namespaces/{namespace}/sftjobs/lab/status?fieldManager=them&force=true"
    body = status | {"status": {"conditions": [theirs]}}
    api.client.request("PATCH", path, body, content="application/apply-patch+yaml")

    async def ask(cluster: Cluster) -> Any:
        seen = await cluster.get("SFTJob", namespace, "lab")
        assert seen is not None
        both = await cluster.apply_status(seen, {"conditions": [ours], "restarts": 1})
        return both, await cluster.apply_status(both, {"conditions": []})

    both, without = asking(api, ask)
    assert [found["type"] for found in both["status"]["conditions"]] == ["Theirs", "Prepared"]
    assert [found["type"] for found in without["status"]["conditions"]] == ["Theirs"]
    assert "restarts" not in without["status"]


def test_a_field_that_the_crd_does_not_know_is_said_to_be_the_crds_fault(api: ApiServer) -> None:
    namespace = api.new_namespace()
    api.client.create(sftjob(namespace))

    async def ask(cluster: Cluster) -> Any:
        seen = await cluster.get("SFTJob", namespace, "lab")
        assert seen is not None
        return await cluster.apply_status(seen, {"mood": "good"})

    error = refused(api, ask)
    assert error.status == 500
    assert str(error).startswith("the CRD in the cluster is older than this operator")


def test_an_object_is_deleted_only_if_it_is_the_one_that_was_meant(api: ApiServer) -> None:
    namespace = api.new_namespace()

    async def ask(cluster: Cluster) -> Any:
        made = await cluster.create(config_map(namespace))
        await cluster.delete(namespace, ObjectRef("ConfigMap", "lab-run", "a namesake's uid"))
        spared = await cluster.get("ConfigMap", namespace, "lab-run")
        await cluster.delete(namespace, ObjectRef("ConfigMap", "lab-run", made["metadata"]["uid"]))
        return spared is not None, await cluster.get("ConfigMap", namespace, "lab-run")

    assert asking(api, ask) == (True, None)


def test_deleting_what_is_gone_is_fine(api: ApiServer) -> None:
    namespace = api.new_namespace()
    assert asking(api, lambda cluster: cluster.delete(namespace, ObjectRef("PyTorchJob", "lab-1", "x"))) is None


def test_a_gang_is_deleted_in_the_foreground_so_that_its_absence_means_its_pods_are_gone(api: ApiServer) -> None:
    namespace = api.new_namespace()

    async def ask(cluster: Cluster) -> Any:
        made = await cluster.create(pytorch_job(namespace))
        return await cluster.delete(namespace, ObjectRef("PyTorchJob", "lab-1", made["metadata"]["uid"]))

    left = asking(api, ask)
    assert left["metadata"]["deletionTimestamp"]
    assert left["metadata"]["finalizers"] == ["foregroundDeletion"]


def test_a_pod_that_no_node_will_confirm_is_gone_at_once_by_force(api: ApiServer) -> None:
    namespace = api.new_namespace()
    api.client.create(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace}}
    )
    spec = {"nodeName": "node-1", "containers": [{"name": "pytorch", "image": "x"}]}
    meta = {"name": "p", "namespace": namespace}
    api.client.create({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})

    async def ask(cluster: Cluster) -> Any:
        asked = await cluster.delete(namespace, ObjectRef("Pod", "p"))
        assert asked is not None
        waits = await cluster.get("Pod", namespace, "p")
        await cluster.delete(namespace, ObjectRef("Pod", "p", asked["metadata"]["uid"], force=True))
        return waits is not None, await cluster.get("Pod", namespace, "p")

    assert asking(api, ask) == (True, None)


# ── what pods and nodes tell ───────────────────────────────────────────────────────────────────────────────────────


def test_warnings_about_an_object_are_found_and_others_are_not(api: ApiServer) -> None:
    namespace = api.new_namespace()

    def event(name: str, kind: str, about: str) -> dict[str, Any]:
        involved = {"kind": "PyTorchJob", "name": "lab-1", "namespace": namespace, "uid": about}
        metadata = {"name": name, "namespace": namespace}
        told = {"type": kind, "reason": "FailedCreatePod", "message": name, "involvedObject": involved}
        return {"apiVersion": "v1", "kind": "Event", "metadata": metadata, **told}

    for given in (event("a", "Warning", "u1"), event("b", "Normal", "u1"), event("c", "Warning", "u2")):
        api.client.create(given)
    found = asking(api, lambda cluster: cluster.warnings(namespace, "u1"))
    assert found == (Trouble("FailedCreatePod", "a"),)


def test_a_log_that_cannot_be_had_is_empty(api: ApiServer) -> None:
    assert asking(api, lambda cluster: cluster.log_tail(api.new_namespace(), "no-such-pod")) == ""


@pytest.mark.parametrize(("ready", "is_lost"), [("True", False), ("False", True), ("Unknown", True)], ids=str)
def test_a_node_is_lost_when_the_control_plane_does_not_hear_from_it(api: ApiServer, ready: str, is_lost: bool) -> None:
    name = f"node-{ready.lower()}"
    api.client.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    api.client.patch(
        "Node", name, {"status": {"conditions": [{"type": "Ready", "status": ready}]}}, subresource="status"
    )
    assert asking(api, lambda cluster: cluster.node_is_lost(name)) is is_lost


def test_a_node_that_was_deleted_is_lost(api: ApiServer) -> None:
    assert asking(api, lambda cluster: cluster.node_is_lost("no-such-node")) is True


@asynccontextmanager
async def trainer(address: str, answer: web.Response) -> AsyncIterator[None]:
    async def handle(request: web.Request) -> web.Response:
        return answer

    app = web.Application()
    app.add_routes([web.get("/progress", handle)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, address, labels.METRICS_PORT).start()
    try:
        yield
    finally:
        await runner.cleanup()


def progress_of(api: ApiServer, answer: web.Response) -> TrainerReport | None:
    async def ask(cluster: Cluster) -> TrainerReport | None:
        async with trainer(api.layout.loopback, answer):
            return await cluster.progress(api.layout.loopback)

    found: TrainerReport | None = asking(api, ask)
    return found


def test_progress_is_what_the_trainer_answers(api: ApiServer) -> None:
    report = TrainerReport(attempt=3, productive_seconds=12.5)
    answer = web.Response(text=report.model_dump_json(by_alias=True), content_type="application/json")
    assert progress_of(api, answer) == report


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(text="{}"),
        web.Response(text="not JSON"),
        web.Response(status=503, text='{"attempt": 1}'),
        web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}),
        web.Response(text='{"attempt": 1' + " " * (1 << 20) + "}"),
    ],
    ids=["no report", "no JSON", "not ready", "points elsewhere", "too long"],
)
def test_progress_that_is_no_report_is_none(api: ApiServer, answer: web.Response) -> None:
    assert progress_of(api, answer) is None


def test_progress_of_a_pod_that_does_not_answer_is_none(api: ApiServer) -> None:
    assert asking(api, lambda cluster: cluster.progress(api.layout.loopback)) is None


# ── what is served, and what goes wrong ────────────────────────────────────────────────────────────────────────────


def test_what_is_served_is_known(api: ApiServer) -> None:
    async def ask(cluster: Cluster) -> Any:
        kinds = ("SFTJob", "PyTorchJob", "PodGroup")
        return [await cluster.serves(kind) for kind in kinds], await cluster.groups()

    served, groups = asking(api, ask)
    assert served == [True, True, True]
    assert {"sftjob.dev", "kubeflow.org", "scheduling.k8s.io"} <= groups


def test_a_kind_that_nobody_serves_is_not_served(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = module.RESOURCES
    absent = {"Absent": module.Resource("absent.dev/v1", "x"), "Half": module.Resource("batch/v1", "x")}
    monkeypatch.setattr(module, "RESOURCES", {**resources, **absent})
    assert asking(api, lambda cluster: cluster.serves("Absent")) is False
    assert asking(api, lambda cluster: cluster.serves("Half")) is False


def test_no_answer_is_an_error_without_a_status(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(cluster: Cluster) -> Any:
        cluster._api.configuration.host = f"https://{api.layout.loopback}:1"
        return await cluster.groups()

    error = refused(api, ask)
    assert error.status is None
    assert str(error).startswith("GET /apis: no answer from the API server: ")


def test_an_api_server_that_does_not_answer_is_not_waited_for_for_ever(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALL_SECONDS", 0.2)

    async def ask(cluster: Cluster) -> Any:
        held: list[asyncio.StreamWriter] = []
        silent = await asyncio.start_server(lambda reader, writer: held.append(writer), api.layout.loopback, 0)
        async with silent:
            port = silent.sockets[0].getsockname()[1]
            cluster._api.configuration.host = f"http://{api.layout.loopback}:{port}"
            try:
                return await cluster.groups()
            finally:
                for writer in held:
                    writer.close()
                    await writer.wait_closed()

    error = refused(api, ask)
    assert error.status is None
    assert "TimeoutError" in str(error)
