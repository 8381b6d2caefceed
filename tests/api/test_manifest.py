from __future__ import annotations

import datetime
from typing import Any

import pytest

from sft_api.job import SFTJob
from sft_api.manifest import ManifestError, parse_job
from tests.api.jobs import document
from tests.api.tables import BAD, GOOD, UNSEEN


def problems(given: object) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse_job(given)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("case", [*BAD, *UNSEEN])
def test_a_bad_manifest_is_refused_with_all_that_is_wrong(case: str) -> None:
    changes, lines = (BAD | UNSEEN)[case]
    assert problems(document(changes)) == lines


@pytest.mark.parametrize("case", GOOD)
def test_a_good_manifest_is_a_job(case: str) -> None:
    assert isinstance(parse_job(document(GOOD[case])), SFTJob)


NO_JOBS: dict[str, tuple[object, str]] = {
    "nothing": (None, "null is no SFTJob"),
    "a word": ("granite", '"granite" is no SFTJob'),
    "a list": ([document()], "a list of 1 element is no SFTJob"),
}


@pytest.mark.parametrize("case", NO_JOBS)
def test_what_is_no_mapping_is_no_job(case: str) -> None:
    given, line = NO_JOBS[case]
    fields = "apiVersion (required), kind (required), metadata (required), spec (required)"
    assert problems(given) == [f"{line}; allowed: a mapping with the fields {fields}"]


def test_an_empty_mapping_is_told_what_it_lacks() -> None:
    assert problems({})[:3] == [
        "apiVersion: is required and missing; give sftjob.dev/v1alpha1",
        "kind: is required and missing; give SFTJob",
        "metadata: is required and missing; give a mapping with the fields "
        "name (required), namespace, labels, annotations",
    ]


def test_a_problem_knows_its_path_and_its_message() -> None:
    with pytest.raises(ManifestError) as caught:
        parse_job(document({"spec.phases[1].data[0].format": "Chat"}))
    [problem] = caught.value.problems
    assert problem.path == "spec.phases[1].data[0].format"
    assert problem.message == '"Chat" is not allowed; allowed: Messages, Pretraining'


def test_a_job_read_from_a_cluster_is_taken_with_its_status() -> None:
    status = {"observedGeneration": 1, "state": "Running", "conditions": []}
    assert parse_job({**document(), "status": status}).status is not None


def test_a_quantity_is_text_however_it_was_written() -> None:
    resources = {"requests": {"cpu": 8}, "limits": {"cpu": "8"}}
    trainer = parse_job(document({"spec.trainer": {"resources": resources, "sharedMemory": 1024}})).spec.trainer
    assert trainer.resources.requests == trainer.resources.limits == {"cpu": "8"}
    assert trainer.shared_memory == "1024"


def test_a_pod_template_stays_as_it_was_written() -> None:
    template = GOOD["a pod's own"]["spec.trainer"]["podTemplate"]
    assert parse_job(document(GOOD["a pod's own"])).spec.trainer.pod_template == template


def test_a_date_that_yaml_made_is_text_again() -> None:
    job = parse_job(document({"spec.model.revision": datetime.date(2026, 1, 2)}))
    assert job.spec.model.revision == "2026-01-02"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    [line] = problems(document({"spec.optimizer": {"learningRate": value}}))
    assert line.endswith("is not allowed; allowed: a number above 0 and at most 1")


def test_a_document_that_holds_itself_is_refused() -> None:
    given: dict[str, Any] = document()
    given["spec"]["model"] = given
    assert problems(given) == ["cannot be read as plain data: Circular reference detected"]


def test_a_long_value_is_cut_in_its_message() -> None:
    [line] = problems(document({"spec.recipe": "x" * 5000}))
    assert (
        line == f'spec.recipe: "{"x" * 60}…" (5000 characters) is not allowed; allowed: LAB, TULU, TULUPlusPlus, none'
    )


def test_the_document_is_left_as_it_was() -> None:
    given = document({"spec.seed": None})
    parse_job(given)
    assert given == document({"spec.seed": None})
