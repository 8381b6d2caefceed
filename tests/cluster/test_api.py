"""Our CRD on a real API server: what it takes, what it refuses and in which words, what it fills in and shows.

And the small model of one that the fast tests ask (`tests/api/api_server.py`): it must agree. The CRD stands here
under another name, beside that of an operator that may be at work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings

from sft_api.crd import custom_resource_definition
from sft_api.manifest import parse_job
from sft_api.rules import RULES
from tests.api.api_server import ApiServer
from tests.api.jobs import document
from tests.api.mixed import mixed_documents
from tests.api.tables import BAD, CHANGES, GOOD, MAY_CHANGE, UNSEEN
from tests.cluster.bed import Cluster
from tests.cluster.client import ApiError
from tests.cluster.waiting import is_true

GROUP, KIND, PLURAL = "tried.sftjob.dev", "TriedSFTJob", "triedsftjobs"
OF_THE_SERVER = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "namespace")
SECONDS = 30.0


def renamed_crd() -> dict[str, Any]:
    crd = copy.deepcopy(custom_resource_definition())
    crd["metadata"]["name"] = f"{PLURAL}.{GROUP}"
    crd["spec"]["group"] = GROUP
    crd["spec"]["names"] = {"kind": KIND, "listKind": f"{KIND}List", "plural": PLURAL, "singular": KIND.lower()}
    return crd


MODEL = ApiServer(renamed_crd())


def renamed(job: dict[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in job["metadata"].items() if name not in OF_THE_SERVER}
    return job | {"apiVersion": f"{GROUP}/v1alpha1", "kind": KIND, "metadata": metadata}


@dataclass(frozen=True)
class Served:
    """Our kind, served by a real API server."""

    cluster: Cluster
    namespace: str

    def ask(self, method: str, job: dict[str, Any], name: str = "", dry: bool = True) -> dict[str, Any]:
        """The object as the server would store it. Raises ApiError with the server's words."""
        path = f"/apis/{GROUP}/v1alpha1/namespaces/{self.namespace}/{PLURAL}{name and f'/{name}'}"
        query = f"?fieldValidation=Strict{'&dryRun=All' if dry else ''}"
        stored: dict[str, Any] = self.cluster.client.request(method, path + query, job)
        return stored

    def refusal(self, job: dict[str, Any]) -> str | None:
        try:
            self.ask("POST", renamed(job))
        except ApiError as error:
            return str(error)
        return None

    def refusal_of_change(self, new: dict[str, Any], old: dict[str, Any]) -> str | None:
        """What is said of a change of an object that is there."""
        name = old["metadata"]["name"]
        there = self.ask("POST", renamed(old), dry=False)
        changed = renamed(new)
        changed["metadata"]["resourceVersion"] = there["metadata"]["resourceVersion"]
        try:
            self.ask("PUT", changed, name)
        except ApiError as error:
            return str(error)
        finally:
            self.remove(name)
        return None

    def remove(self, name: str) -> None:
        """At once: it owns nothing that would have to go first."""
        self.ask("DELETE", {"propagationPolicy": "Background"}, name, dry=False)


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Iterator[Served]:
    crd = renamed_crd()
    cluster.apply(crd)
    name = crd["metadata"]["name"]
    kind = "customresourcedefinition"
    cluster.wait_for("the CRD is served", lambda: is_true(cluster.get(kind, name), "Established"), SECONDS)
    there = Served(cluster, cluster.new_namespace("api"))
    cluster.wait_for("our kind takes objects", lambda: there.refusal(document()) is None, SECONDS)
    yield there
    cluster.delete(kind, name)


def test_the_schema_is_structural_and_its_rules_are_within_the_budget(served: Served) -> None:
    crd = served.cluster.get("customresourcedefinition", f"{PLURAL}.{GROUP}")
    assert is_true(crd, "NamesAccepted")
    assert not is_true(crd, "NonStructuralSchema")


@pytest.mark.parametrize("case", [case for case in BAD if not {"apiVersion", "kind"} & set(BAD[case][0])])
def test_what_validate_refuses_is_refused_in_our_words(case: str, served: Served) -> None:
    bad = document(BAD[case][0])
    words = served.refusal(bad)
    assert words is not None, BAD[case][1]
    expected = MODEL.refusals(renamed(bad))
    broken = {rule.message for rule in RULES if any(line.endswith(f": {rule.message}") for line in expected)}
    assert [message for message in broken if message not in words] == [], words


@pytest.mark.parametrize("case", [*GOOD, *UNSEEN])
def test_what_is_good_is_taken_with_the_defaults_of_our_model(case: str, served: Served) -> None:
    good = document(GOOD[case] if case in GOOD else UNSEEN[case][0])
    stored = served.ask("POST", renamed(good))
    assert stored["status"] == {"observedGeneration": 0, "conditions": [], "attempts": []}
    if case in GOOD:
        assert parse_job(document() | {"spec": stored["spec"]}).spec == parse_job(good).spec


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mixed=mixed_documents())
def test_the_model_of_an_api_server_agrees_with_a_real_one(mixed: dict[str, Any], served: Served) -> None:
    refused, modelled = served.refusal(mixed), MODEL.refusals(renamed(mixed))
    assert bool(refused) == bool(modelled), (refused, modelled)


@pytest.mark.parametrize("path", CHANGES)
def test_a_change_is_refused_as_immutable(path: str, served: Served) -> None:
    [words] = MODEL.refusals(renamed(document({path: CHANGES[path]})), renamed(document()))
    refused = served.refusal_of_change(document({path: CHANGES[path]}), document())
    assert words.partition(": ")[2].endswith("is immutable")
    assert words.partition(": ")[2] in (refused or "taken")


@pytest.mark.parametrize("path", MAY_CHANGE)
def test_what_says_nothing_of_the_result_may_change_and_change_back(path: str, served: Served) -> None:
    assert served.refusal_of_change(document({path: MAY_CHANGE[path]}), document()) is None
    assert served.refusal_of_change(document(), document({path: MAY_CHANGE[path]})) is None


TEMPLATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another field": ({"spec": {"hostNetwork": True}}, {"spec": {"hostPID": True}}),
    "another value": ({"spec": {"volumes": [{"name": "a"}]}}, {"spec": {"volumes": [{"name": "b"}]}}),
    "another part": ({"metadata": {"labels": {"a": "b"}}}, {"spec": {"hostNetwork": True}}),
    "nothing any more": ({"spec": {"hostNetwork": True}}, {}),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_change_of_a_pod_template_is_seen_though_its_fields_are_not(case: str, served: Served) -> None:
    old, new = (document({"spec.trainer": {"podTemplate": template}}) for template in TEMPLATES[case])
    assert "spec.trainer is immutable" in (served.refusal_of_change(new, old) or "taken")


def test_kubectl_explains_every_field(served: Served) -> None:
    told = " ".join(served.cluster.kubectl("explain", f"{PLURAL}.spec.scheduling").split())
    assert "How the pods of the gang get onto nodes." in told
    assert "queue <string> The queue that the gang waits in, with Volcano, Kueue" in told


def test_kubectl_get_says_why_a_job_failed(served: Served) -> None:
    served.ask("POST", renamed(document()), dry=False)
    failed = {
        "type": "Succeeded",
        "status": "False",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
        "reason": "OutOfMemory",
        "message": "the GPU's memory is full",
    }
    status = {"state": "Failed", "conditions": [failed], "progress": {"step": 7, "percent": 70, "loss": 1.25}}
    status["progress"] |= {
        "totalSteps": 10,
        "epoch": 1,
        "samples": 1,
        "tokens": 1,
        "heartbeat": "2026-01-02T03:04:05Z",
    }
    served.cluster.client.patch(PLURAL, "granite", {"status": status}, served.namespace, subresource="status")
    header, row = served.cluster.kubectl("get", PLURAL, "-n", served.namespace).splitlines()
    assert header.split() == [
        *("NAME", "STATE", "PHASE", "STEP", "PROGRESS", "LOSS", "RESTARTS", "CHECKPOINT", "REASON", "AGE"),
    ]
    assert row.split()[:-1] == ["granite", "Failed", "7", "70", "1.25", "OutOfMemory"]
    served.remove("granite")
