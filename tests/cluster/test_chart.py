"""The chart on a real Kubernetes, by real Helm: rights as granted, upgrades of the definition, removal and return."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.bed import RESTRICTED, RESTRICTED_CONTAINER, RESTRICTED_POD, Cluster
from tests.cluster.client import ApiError, Manifest
from tests.cluster.images import BUSYBOX

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/sftjob-operator"
CRD = "sftjobs.sftjob.dev"
JOB = "kept"


@dataclass(frozen=True)
class Release:
    """The chart as it is installed in the cluster."""

    cluster: Cluster
    name: str
    namespace: str
    values: Path

    @property
    def account(self) -> str:
        return f"system:serviceaccount:{self.namespace}:{self.name}-sftjob-operator"

    def helm(self, verb: str, *arguments: str) -> str:
        return self.cluster.helm(verb, self.name, *arguments, "-n", self.namespace, "--wait", "--timeout", "120s")

    def upgrade(self, chart: Path = CHART) -> None:
        self.helm("upgrade", str(chart), "--values", str(self.values))

    def install(self) -> None:
        self.helm("install", str(CHART), "--values", str(self.values))

    def available_replicas(self) -> int:
        deployment = self.cluster.get("Deployment", f"{self.name}-sftjob-operator", self.namespace) or {}
        return int(deployment.get("status", {}).get("availableReplicas", 0))


@pytest.fixture(scope="module")
def release(operator: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The one that all tests share, whatever it was installed with."""
    [found] = json.loads(operator.helm("list", "--all-namespaces", "--filter", "^sft$", "-o", "json"))
    values = tmp_path_factory.mktemp("release") / "values.json"
    values.write_text(operator.helm("get", "values", found["name"], "-n", found["namespace"], "-o", "json"))
    return Release(operator, found["name"], found["namespace"], values)


@pytest.fixture
def job(release: Release) -> Manifest:
    """A suspended job in a namespace of its own."""
    manifest: Manifest = yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())
    manifest["metadata"] = {"name": JOB, "namespace": release.cluster.new_namespace("chart", RESTRICTED)}
    manifest["spec"]["suspend"] = True
    release.cluster.apply(manifest)
    return manifest


def may(cluster: Cluster, who: str, verb: str, what: str, namespace: str = "", name: str = "") -> bool:
    """What RBAC says to `who`; `what` is resource, resource/subresource, or either with `.group`."""
    resource, _, group = what.partition(".")
    resource, _, subresource = resource.partition("/")
    asked = {"verb": verb, "resource": resource, "subresource": subresource, "group": group}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": who, "resourceAttributes": asked | {"namespace": namespace, "name": name}},
    }
    answer = cluster.client.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


def spec_fields(cluster: Cluster) -> set[str]:
    """What the API server knows below `spec` of an SFTJob."""
    crd = cluster.get("CustomResourceDefinition", CRD)
    assert crd is not None
    [version] = crd["spec"]["versions"]
    return set(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])


def older_chart(folder: Path, without: str) -> Path:
    """The chart as it was before SFTJobs had the field `without`."""
    chart = Path(shutil.copytree(CHART, folder / "older"))
    file = chart / "files/sftjobs.sftjob.dev.yaml"
    crd = yaml.safe_load(file.read_text())
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"][without]
    spec["x-kubernetes-validations"] = [
        rule for rule in spec["x-kubernetes-validations"] if without not in rule["rule"]
    ]
    file.write_text(yaml.safe_dump(crd, sort_keys=False))
    return chart


def test_the_operator_becomes_ready_under_the_restricted_standard(release: Release) -> None:
    namespace = release.cluster.get("Namespace", release.namespace) or {}
    assert RESTRICTED.items() <= namespace["metadata"]["labels"].items()
    assert release.available_replicas() == 1


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        ("patch", "sftjobs/status.sftjob.dev"),
        ("update", "sftjobs/finalizers.sftjob.dev"),
        ("create", "pytorchjobs.kubeflow.org"),
        ("delete", "jobs.batch"),
        ("patch", "podgroups.scheduling.k8s.io"),
        ("get", "pods/log"),
        ("list", "nodes"),
    ],
)
def test_the_operator_may(release: Release, verb: str, what: str) -> None:
    assert may(release.cluster, release.account, verb, what, "default")


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        ("get", "secrets"),
        ("patch", "sftjobs.sftjob.dev"),
        ("delete", "sftjobs.sftjob.dev"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("patch", "nodes"),
        ("create", "leases.coordination.k8s.io"),
        ("get", "customresourcedefinitions.apiextensions.k8s.io"),
    ],
)
def test_the_operator_may_not(release: Release, verb: str, what: str) -> None:
    assert not may(release.cluster, release.account, verb, what, release.namespace)


def test_the_operator_may_write_its_own_lease_and_no_other(release: Release) -> None:
    write = (release.cluster, release.account, "update", "leases.coordination.k8s.io", release.namespace)
    assert may(*write, name=f"{release.name}-sftjob-operator")
    assert not may(*write, name="another")


def test_an_operator_for_some_namespaces_has_rights_in_them_alone(release: Release) -> None:
    cluster = release.cluster
    served, system = cluster.new_namespace("served"), cluster.new_namespace("system", RESTRICTED)
    values = {
        "watchNamespaces": [served],
        "crds": {"enabled": False},
        "gang": {"native": {"enabled": True, "admissionPolicy": False}},
        "aggregateRoles": False,
        "replicas": 0,
    }
    cluster.helm("install", "team", str(CHART), "-n", system, "--values", "-", input=json.dumps(values))
    account = f"system:serviceaccount:{system}:team-sftjob-operator"
    assert may(cluster, account, "create", "pytorchjobs.kubeflow.org", served)
    assert not may(cluster, account, "create", "pytorchjobs.kubeflow.org", system)
    assert not may(cluster, account, "list", "sftjobs.sftjob.dev")
    assert not may(cluster, account, "list", "nodes")
    cluster.helm("uninstall", "team", "-n", system)


def test_who_may_view_a_namespace_may_view_its_jobs_and_who_may_edit_it_may_make_them(release: Release) -> None:
    cluster, namespace = release.cluster, release.cluster.new_namespace("users")
    for user, role in {"viewer": "view", "editor": "edit"}.items():
        cluster.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", "-n", namespace)
    jobs = "sftjobs.sftjob.dev"
    cluster.wait_for("view knows SFTJobs", lambda: may(cluster, "viewer", "list", jobs, namespace), 30)
    cluster.wait_for("edit knows SFTJobs", lambda: may(cluster, "editor", "create", jobs, namespace), 30)
    assert not may(cluster, "viewer", "create", jobs, namespace)
    assert not may(cluster, "editor", "patch", "sftjobs/status.sftjob.dev", namespace)


@pytest.mark.parametrize(("labels", "group"), [({"sftjob.dev/pod-group": "quick-1"}, "quick-1"), ({}, None)])
def test_a_pod_that_names_a_pod_group_is_put_into_it_and_no_other(
    release: Release, labels: dict[str, str], group: str | None
) -> None:
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": "default", "labels": labels},
        "spec": {
            "securityContext": RESTRICTED_POD,
            "containers": [{"name": "probe", "image": BUSYBOX, "securityContext": RESTRICTED_CONTAINER}],
        },
    }

    def admitted() -> bool:
        spec = release.cluster.client.create(pod, dry_run=True)["spec"]
        return bool(spec.get("schedulingGroup", {}).get("podGroupName") == group)

    release.cluster.wait_for(f"a pod is in the group {group}", admitted, 30)


def test_an_upgrade_of_the_chart_upgrades_the_definition_and_keeps_the_jobs(
    release: Release, job: Manifest, tmp_path: Path
) -> None:
    cluster, namespace = release.cluster, job["metadata"]["namespace"]
    release.upgrade(older_chart(tmp_path, without="seed"))
    assert "seed" not in spec_fields(cluster)
    release.upgrade()
    assert "seed" in spec_fields(cluster)
    assert (cluster.get("SFTJob", JOB, namespace) or {})["spec"]["suspend"] is True
    assert release.available_replicas() == 1


def test_the_jobs_outlive_the_release_and_it_takes_them_over_again(release: Release, job: Manifest) -> None:
    cluster, namespace = release.cluster, job["metadata"]["namespace"]
    release.helm("uninstall")
    assert cluster.get("SFTJob", JOB, namespace)
    assert not cluster.get("ClusterRole", f"{release.name}-sftjob-operator")
    with pytest.raises(AssertionError, match="invalid ownership metadata"):
        cluster.helm("install", "other", str(CHART), "-n", release.namespace, "--set", "replicas=0")
    release.install()
    assert cluster.get("SFTJob", JOB, namespace)
    assert release.available_replicas() == 1


def test_a_release_of_another_name_takes_the_definition_over_when_told(release: Release, job: Manifest) -> None:
    cluster = release.cluster
    release.helm("uninstall")
    cluster.helm("install", "other", str(CHART), "-n", release.namespace, "--set", "replicas=0", "--take-ownership")
    cluster.helm("uninstall", "other", "-n", release.namespace)
    release.helm("install", str(CHART), "--values", str(release.values), "--take-ownership")
    assert cluster.get("SFTJob", JOB, job["metadata"]["namespace"])


def test_a_definition_that_is_not_to_be_kept_goes_with_the_release(release: Release, job: Manifest) -> None:
    cluster = release.cluster
    release.helm("upgrade", str(CHART), "--values", str(release.values), "--set", "crds.keep=false")
    release.helm("uninstall")
    cluster.wait("CustomResourceDefinition", CRD, None, lambda found: found is None, 60)
    release.install()
    with pytest.raises(ApiError, match="not found"):
        cluster.client.request(
            "GET", f"/apis/sftjob.dev/v1alpha1/namespaces/{job['metadata']['namespace']}/sftjobs/{JOB}"
        )
