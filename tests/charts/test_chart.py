"""The chart, rendered: what it installs, with which rights, and which values it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sft_api.labels import POD_GROUP
from sft_operator.settings import VARIABLES
from tests.charts.helm import CHART, POLICIES, ROOT, Rendered, helm, refusal, template

TWO_NAMESPACES = {"watchNamespaces": ["team-a", "team-b"]}
VALUE_SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "namespaced": TWO_NAMESPACES,
    "without crds": {"crds": {"enabled": False}},
    "two replicas": {"replicas": 2},
    "no election": {"leaderElection": False},
    "by digest": {"image": {"digest": "sha256:" + "0" * 64, "pullSecrets": [{"name": "registry"}]}},
    "placed": {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "podLabels": {"team": "ml"},
        "podAnnotations": {"note": "x"},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    },
}
UNKNOWN = {
    "a misspelt value": ({"replicaCount": 2}, "additional properties 'replicaCount' not allowed"),
    "a misspelt value further in": ({"crds": {"install": True}}, "additional properties 'install' not allowed"),
    "a gang that is neither": ({"gang": {"native": {"enabled": "yes"}}}, "value must be one of 'auto', true, false"),
    "a namespace by pattern": ({"watchNamespaces": ["team-*"]}, "'team-*' does not match pattern"),
    "a tag as digest": ({"image": {"digest": "0.1.0"}}, "'0.1.0' does not match pattern"),
    "a GPU without a domain": ({"gpuResource": "gpu"}, "'gpu' does not match pattern"),
    "replicas without a leader": (
        {"replicas": 2, "leaderElection": False},
        "several operators would work against each other",
    ),
}

parametrize_values = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())


def rules(rendered: Rendered) -> list[dict[str, Any]]:
    """Every rule of the operator's roles; users' roles are another matter."""
    roles = [*rendered.all("Role"), *rendered.all("ClusterRole")]
    users = ("-view", "-edit")
    return [rule for role in roles if not role["metadata"]["name"].endswith(users) for rule in role["rules"]]


@parametrize_values
def test_helm_finds_nothing_to_say_about_the_chart(values: dict[str, Any]) -> None:
    linted = helm("lint", "--strict", str(CHART), values=values)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@parametrize_values
def test_no_right_is_a_wildcard_and_none_is_to_secrets(values: dict[str, Any]) -> None:
    for rule in rules(template(values)):
        assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
        assert not {"secrets", "persistentvolumeclaims", "serviceaccounts", "roles"} & set(rule["resources"])
        assert not {"escalate", "bind", "impersonate", "deletecollection"} & set(rule["verbs"])


@parametrize_values
def test_the_operator_is_admitted_by_the_restricted_standard(values: dict[str, Any]) -> None:
    rendered = template(values)
    [container] = rendered.pod["containers"]
    assert rendered.pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [set(volume) - {"name"} for volume in rendered.pod["volumes"]] == [{"emptyDir"}]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & rendered.pod.keys()


@parametrize_values
def test_every_object_can_be_told_by_its_labels(values: dict[str, Any]) -> None:
    for manifest in template(values).manifests:
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "sft"
        assert labels["app.kubernetes.io/name"] == "sftjob-operator"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"


@pytest.mark.parametrize(("values", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_a_value_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    assert message in refusal(values)


def test_other_charts_may_share_global_values() -> None:
    assert template({"global": {"imageRegistry": "registry"}}).one("Deployment")


def test_the_crd_is_the_checked_in_one_and_is_kept() -> None:
    installed = template().one("CustomResourceDefinition")
    generated = yaml.safe_load((ROOT / "crds/sftjobs.sftjob.dev.yaml").read_text())
    assert installed["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert installed["metadata"].pop("labels")
    assert installed == generated


def test_the_chart_ships_the_bytes_of_the_checked_in_crd() -> None:
    name = "sftjobs.sftjob.dev.yaml"
    assert (CHART / "files" / name).read_bytes() == (ROOT / "crds" / name).read_bytes(), "make generate"


def test_the_crd_need_not_be_kept_nor_installed() -> None:
    kept_no_longer = template({"crds": {"keep": False}}).one("CustomResourceDefinition")
    assert "annotations" not in kept_no_longer["metadata"]
    assert template({"crds": {"enabled": False}}).all("CustomResourceDefinition") == []


def test_the_operator_may_do_this_and_no_more() -> None:
    manage = ["get", "list", "watch", "create", "patch", "delete"]
    granted = {
        (rule["apiGroups"][0], resource): rule["verbs"] for rule in rules(template()) for resource in rule["resources"]
    }
    assert granted == {
        ("sftjob.dev", "sftjobs"): ["get", "list", "watch"],
        ("sftjob.dev", "sftjobs/status"): ["get", "patch", "update"],
        ("sftjob.dev", "sftjobs/finalizers"): ["update"],
        ("kubeflow.org", "pytorchjobs"): manage,
        ("batch", "jobs"): manage,
        ("scheduling.k8s.io", "podgroups"): manage,
        ("", "configmaps"): manage,
        ("", "pods"): ["get", "list", "watch", "delete"],
        ("", "pods/log"): ["get"],
        ("", "events"): ["get", "list", "create", "patch"],
        ("", "nodes"): ["get", "list"],
        ("admissionregistration.k8s.io", "mutatingadmissionpolicybindings"): ["get"],
        ("coordination.k8s.io", "leases"): ["get", "update"],
    }


def test_with_namespaces_named_it_has_no_right_beyond_them() -> None:
    rendered = template(TWO_NAMESPACES | {"aggregateRoles": False})
    assert rendered.all("ClusterRole") == rendered.all("ClusterRoleBinding") == []
    where = sorted((role["metadata"]["namespace"], role["metadata"]["name"]) for role in rendered.all("Role"))
    assert where == [
        ("sftjob-system", "sft-sftjob-operator-leader"),
        ("team-a", "sft-sftjob-operator"),
        ("team-b", "sft-sftjob-operator"),
    ]
    assert {role["metadata"]["namespace"] for role in rendered.all("RoleBinding")} == {
        "sftjob-system",
        "team-a",
        "team-b",
    }
    for binding in rendered.all("RoleBinding"):
        [subject] = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == ("sft-sftjob-operator", "sftjob-system")
    assert "nodes" not in {resource for rule in rules(rendered) for resource in rule["resources"]}


def test_the_operator_is_told_what_the_values_say() -> None:
    told = template(TWO_NAMESPACES | {"trainer": {"image": "registry/own:1"}, "gpuResource": "amd.com/gpu"}).environment
    assert told == {
        "SFTJOB_NAMESPACES": "team-a,team-b",
        "SFTJOB_TRAINER_IMAGE": "registry/own:1",
        "SFTJOB_GPU_RESOURCE": "amd.com/gpu",
        "SFTJOB_LEASE": "sft-sftjob-operator",
        "SFTJOB_NATIVE_GANG": "true",
        "SFTJOB_LOG_LEVEL": "INFO",
        "SFTJOB_HTTP_PORT": "8080",
        "POD_NAME": {"fieldRef": {"fieldPath": "metadata.name"}},
        "POD_NAMESPACE": {"fieldRef": {"fieldPath": "metadata.namespace"}},
    }


def test_the_operator_understands_every_variable_that_it_is_told() -> None:
    assert template().environment.keys() <= VARIABLES.keys()


def test_unset_images_are_those_of_the_charts_version() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    rendered = template()
    [container] = rendered.pod["containers"]
    assert container["image"] == f"ghcr.io/sftjob/operator:{version}"
    assert rendered.environment["SFTJOB_TRAINER_IMAGE"] == f"ghcr.io/sftjob/sft-trainer:{version}"


def test_the_charts_version_is_that_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"\n' in (ROOT / "pyproject.toml").read_text()
    assert chart["version"] == chart["appVersion"]


def test_a_digest_is_taken_instead_of_a_tag() -> None:
    [container] = template(VALUE_SETS["by digest"] | {"image": {"tag": "1", "digest": "sha256:" + "0" * 64}}).pod[
        "containers"
    ]
    assert container["image"] == "ghcr.io/sftjob/operator@sha256:" + "0" * 64


def test_the_lease_is_there_and_has_nothing_that_the_operator_writes() -> None:
    rendered = template()
    lease = rendered.one("Lease")
    assert lease.keys() == {"apiVersion", "kind", "metadata"}
    assert "annotations" not in lease["metadata"]
    [rule] = rendered.one("Role")["rules"]
    assert rule["resourceNames"] == [lease["metadata"]["name"]] == [rendered.environment["SFTJOB_LEASE"]]


def test_without_election_there_is_one_operator_at_any_time() -> None:
    rendered = template({"leaderElection": False})
    assert rendered.all("Lease") == rendered.all("Role") == []
    assert rendered.environment["SFTJOB_LEASE"] == ""
    assert rendered.one("Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_of_several_replicas_no_more_than_one_is_evicted_at_a_time() -> None:
    assert template().all("PodDisruptionBudget") == []
    budget = template({"replicas": 2}).one("PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["selector"] == template({"replicas": 2}).one("Deployment")["spec"]["selector"]


@pytest.mark.parametrize(
    ("asked", "served", "installed"),
    [
        ("auto", (POLICIES,), True),
        ("auto", (), False),
        (True, (), True),
        (False, (POLICIES,), False),
    ],
)
def test_the_policy_of_gangs_is_installed_where_it_is_asked_for_or_served(
    asked: str | bool, served: tuple[str, ...], installed: bool
) -> None:
    rendered = template({"gang": {"native": {"admissionPolicy": asked}}}, served=served)
    names = [policy["metadata"]["name"] for policy in rendered.all("MutatingAdmissionPolicy")]
    assert names == (["sftjob-gang"] if installed else [])
    assert len(rendered.all("MutatingAdmissionPolicyBinding")) == len(names)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "auto"),
        ({"gang": {"native": {"enabled": False}}}, "false"),
        (TWO_NAMESPACES, "true"),
        (TWO_NAMESPACES | {"gang": {"native": {"admissionPolicy": False}}}, "false"),
        (TWO_NAMESPACES | {"gang": {"native": {"enabled": True, "admissionPolicy": False}}}, "true"),
    ],
)
def test_an_operator_that_may_not_look_for_the_policy_is_told(values: dict[str, Any], told: str) -> None:
    assert template(values).environment["SFTJOB_NATIVE_GANG"] == told


def test_the_policy_and_the_operator_agree_on_the_label() -> None:
    policy = template().one("MutatingAdmissionPolicy")["spec"]
    [condition] = policy["matchConditions"]
    [mutation] = policy["mutations"]
    assert f"'{POD_GROUP}' in object.metadata.labels" in condition["expression"]
    assert f"podGroupName: object.metadata.labels['{POD_GROUP}']" in mutation["applyConfiguration"]["expression"]


def test_those_who_may_view_edit_or_administer_a_namespace_may_do_so_with_its_jobs() -> None:
    rendered = template()
    verbs: dict[str, set[str]] = {"view": set(), "edit": set(), "admin": set()}
    for suffix in ("view", "edit"):
        role = rendered.one("ClusterRole", f"sft-sftjob-operator-{suffix}")
        for who, granted in verbs.items():
            if role["metadata"]["labels"].get(f"rbac.authorization.k8s.io/aggregate-to-{who}") == "true":
                granted |= {verb for rule in role["rules"] for verb in rule["verbs"]}
    assert verbs["view"] == {"get", "list", "watch"}
    assert (
        verbs["edit"] == verbs["admin"] == verbs["view"] | {"create", "update", "patch", "delete", "deletecollection"}
    )


def test_the_pod_is_probed_and_has_bounds() -> None:
    [container] = template().pod["containers"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["resources"] == {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}}


def test_what_places_a_pod_reaches_it() -> None:
    rendered = template(VALUE_SETS["placed"])
    metadata = rendered.one("Deployment")["spec"]["template"]["metadata"]
    assert rendered.pod["nodeSelector"] == {"pool": "system"}
    assert rendered.pod["tolerations"] == [{"operator": "Exists"}]
    assert rendered.pod["affinity"] == {"podAntiAffinity": {}}
    assert rendered.pod["priorityClassName"] == "system-cluster-critical"
    assert metadata["labels"]["team"] == "ml"
    assert metadata["annotations"] == {"note": "x"}
    assert rendered.environment["HTTPS_PROXY"] == "http://proxy:3128"


def test_labels_of_ones_own_cannot_take_a_pod_from_its_deployment() -> None:
    rendered = template({"podLabels": {"app.kubernetes.io/name": "other"}})
    deployment = rendered.one("Deployment")["spec"]
    assert deployment["selector"]["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()
