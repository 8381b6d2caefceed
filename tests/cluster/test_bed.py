"""The test cluster is what it says: a real Kubernetes, with gangs, and gone without a trace however its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.bed import RESTRICTED, RESTRICTED_CONTAINER, RESTRICTED_POD, Cluster
from tests.cluster.bring_up import Bed
from tests.cluster.client import Manifest
from tests.cluster.hostpy import LABEL
from tests.cluster.images import BUSYBOX, ROOT, TRAINER
from tests.cluster.machine import traces
from tests.cluster.waiting import is_true

POD_SECONDS = 60.0

BRING_UP = """
import os, pathlib, sys
from tests.cluster.bring_up import Bed
Bed.up(pathlib.Path(sys.argv[1]), ends_with=os.getpid())
"""


def pod(name: str, namespace: str, command: list[str], image: str = BUSYBOX, **spec: Any) -> Manifest:
    """A pod that a restricted namespace takes; /tmp can be written to."""
    container = {
        "name": "main",
        "image": image,
        "command": command,
        "securityContext": {**RESTRICTED_CONTAINER, "readOnlyRootFilesystem": True},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        **spec.pop("container", {}),
    }
    whole = {
        "securityContext": RESTRICTED_POD,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        **spec,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": whole}


def phase_is(*phases: str) -> Callable[[Manifest | None], bool]:
    return lambda found: bool(found) and found["status"].get("phase") in phases  # type: ignore[index]


def output_of(cluster: Cluster, manifest: Manifest) -> str:
    """What a pod printed, after it has succeeded."""
    name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    cluster.apply(manifest)
    ended = cluster.wait("Pod", name, namespace, phase_is("Succeeded", "Failed"), POD_SECONDS)
    output = cluster.kubectl("logs", name, "-n", namespace)
    assert ended["status"]["phase"] == "Succeeded", output
    return output


def pytorchjob(name: str, namespace: str) -> Manifest:
    """A master that serves, and a worker that asks it."""
    commands = {"Master": "echo hello | nc -l -p 23456", "Worker": f"nc {name}-master-0 23456 | grep hello"}
    replicas = {}
    for role, command in commands.items():
        made = pod("", "", ["sh", "-c", command], container={"name": "pytorch"})
        replicas[role] = {"replicas": 1, "restartPolicy": "Never", "template": {"spec": made["spec"]}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": replicas},
    }


def test_both_nodes_are_ready_and_have_gpus(cluster: Cluster) -> None:
    nodes = list(cluster.list("Node"))
    assert [node["metadata"]["name"] for node in nodes] == list(cluster.nodes) == ["node-1", "node-2"]
    assert all(is_true(node, "Ready") for node in nodes)
    assert [node["status"]["allocatable"]["nvidia.com/gpu"] for node in nodes] == ["8", "8"]
    assert "v1.37.2" in cluster.kubectl("version")
    assert "v4.3" in cluster.helm("version", "--short")


def test_a_pytorchjob_in_a_restricted_namespace_succeeds_worker_included(cluster: Cluster) -> None:
    namespace = cluster.new_namespace("bed", RESTRICTED)
    cluster.apply(pytorchjob("pair", namespace))
    for name in ("pair-master-0", "pair-worker-0"):
        ended = cluster.wait("Pod", name, namespace, phase_is("Succeeded", "Failed"), POD_SECONDS)
        assert ended["status"]["phase"] == "Succeeded", cluster.kubectl("logs", name, "-n", namespace)
    cluster.wait("PyTorchJob", "pair", namespace, partial(is_true, condition="Succeeded"), POD_SECONDS)
    assert "hello" in cluster.kubectl("logs", "pair-worker-0", "-n", namespace)


def test_without_its_configuration_the_training_operator_cannot_start_restricted_workers(cluster: Cluster) -> None:
    namespace = cluster.new_namespace("bed", RESTRICTED)

    def refused() -> str | None:
        events = cluster.list("Event", namespace)
        messages = [event["message"] for event in events if event["reason"] == "FailedCreatePod"]
        return messages[0] if messages else None

    cluster.let_training_operator_start_restricted_workers(False)
    try:
        cluster.apply(pytorchjob("pair", namespace))
        message = cluster.wait_for("the worker's pod is refused", refused, POD_SECONDS)
    finally:
        cluster.let_training_operator_start_restricted_workers(True)
        cluster.delete("PyTorchJob", "pair", namespace)
    assert 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false' in message
    assert 'container "init-pytorch"' in message


def test_a_pod_of_a_labelled_namespace_runs_this_environment_and_reaches_the_bucket(cluster: Cluster) -> None:
    namespace = cluster.new_namespace("bed", {**LABEL, **RESTRICTED})
    bucket = cluster.s3.new_bucket()
    script = (
        "import socket, torch, sft_trainer; from sft_trainer.store import Store; import os\n"
        "print(sft_trainer.__file__, os.getuid(), socket.gethostbyname('kubernetes.default.svc'))\n"
        f"Store.open('{bucket}').put('from-a-pod', str(torch.ones(2).sum().item()).encode())\n"
        "socket.create_connection(('kubernetes.default.svc', 443)).close()\n"
        "try: socket.gethostbyname('nowhere.invalid')\n"
        "except socket.gaierror as error: print(error)\n"
    )
    environment = [{"name": name, "value": value} for name, value in cluster.s3.environment.items()]
    environment += [{"name": name, "value": "/tmp"} for name in ("HOME", "TMPDIR")]
    made = pod("python", namespace, [f"{sys.prefix}/bin/python", "-c", script], TRAINER, container={"env": environment})
    output = output_of(cluster, made)
    assert f"{ROOT}/trainer_image/sft_trainer/__init__.py 10001 10." in output
    assert "Name or service not known" in output
    assert (cluster.s3.folder / bucket.removeprefix("s3://") / "from-a-pod").read_text() == "2.0"


def test_a_pod_of_any_other_namespace_runs_its_image_alone(cluster: Cluster) -> None:
    namespace = cluster.new_namespace("bed", RESTRICTED)
    folders = output_of(cluster, pod("plain", namespace, ["ls", "/"])).split()
    assert "bin" in folders
    assert "usr" not in folders


def test_a_gang_is_placed_whole_or_not_at_all(cluster: Cluster) -> None:
    namespace = cluster.new_namespace("bed", RESTRICTED)
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "5"}}}

    def gang(name: str, size: int) -> list[Manifest]:
        policy = {"schedulingPolicy": {"gang": {"minCount": size}}}
        metadata = {"name": name, "namespace": namespace}
        group: dict[str, Any] = {"schedulingGroup": {"podGroupName": name}}
        pods = [pod(f"{name}-{index}", namespace, ["sleep", "600"], container=gpus, **group) for index in range(size)]
        return [
            {"apiVersion": "scheduling.k8s.io/v1beta1", "kind": "PodGroup", "metadata": metadata, "spec": policy},
            *pods,
        ]

    def unschedulable(group: Manifest | None) -> bool:
        conditions = ((group or {}).get("status") or {}).get("conditions", [])
        return any(condition["reason"] == "Unschedulable" for condition in conditions)

    cluster.apply(gang("too-large", 3))
    cluster.wait("PodGroup", "too-large", namespace, unschedulable, POD_SECONDS)
    cluster.apply(gang("fits", 2))
    places = {
        cluster.wait("Pod", f"fits-{index}", namespace, phase_is("Running"), POD_SECONDS)["spec"]["nodeName"]
        for index in range(2)
    }
    assert places == set(cluster.nodes)
    phases = [cluster.get("Pod", f"too-large-{index}", namespace)["status"]["phase"] for index in range(3)]  # type: ignore[index]
    assert phases == ["Pending"] * 3
    for name in ("fits-0", "fits-1", "too-large-0", "too-large-1", "too-large-2"):
        cluster.delete("Pod", name, namespace)


def test_a_killed_node_is_lost_and_comes_back(cluster: Cluster) -> None:
    cluster.kill_node("node-2")
    try:
        cluster.wait("Node", "node-2", None, lambda node: not is_true(node, "Ready"), 60)
    finally:
        cluster.start_node("node-2")
    namespace = cluster.new_namespace("bed", RESTRICTED)
    assert output_of(cluster, pod("again", namespace, ["echo", "alive"], nodeName="node-2")) == "alive\n"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=lambda ending: ending.name)
def test_nothing_is_left_of_a_cluster_whose_owner_ends_in_the_middle(
    cluster: Cluster, tmp_path: Path, ending: signal.Signals
) -> None:
    state = tmp_path / "state"
    owner = subprocess.Popen(
        [sys.executable, "-c", BRING_UP, str(state)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    cluster.wait_for("its API server starts", lambda: (state / "pids" / "kube-apiserver").exists(), 60)
    bed = Bed.find(state)
    assert bed, "the owner has ended too early"
    assert any(trace.startswith("process") for trace in traces(bed.layout))
    owner.send_signal(ending)
    owner.wait(60)
    cluster.wait_for("nothing of it is left", lambda: not traces(bed.layout), 60)
