from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_api.crd import FILE, as_yaml, custom_resource_definition
from sft_api.manifest import ManifestError, Problem, parse_job
from sft_api.schema import structural
from sft_api.spec import SFTJobSpec
from tests.api.api_server import ApiServer
from tests.api.jobs import GONE, change, document
from tests.api.tables import BAD, GOOD

ROOT = Path(__file__).parents[2]
CRD = custom_resource_definition()
SERVER = ApiServer(CRD)


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")


NODES = dict(nodes(SERVER.schema))


def test_the_checked_in_crd_is_current() -> None:
    assert (ROOT / FILE).read_text() == as_yaml(), "run `python -m sft_api.crd`"


def test_the_crd_fits_into_an_annotation_of_kubectl() -> None:
    assert len(json.dumps(CRD)) < 256 * 1024
    assert (ROOT / FILE).stat().st_size < 256 * 1024


def test_the_yaml_says_what_was_generated() -> None:
    assert yaml.safe_load(as_yaml()) == CRD


@pytest.mark.parametrize("path", [path for path in NODES if path and not path.endswith("[]") and path != ".metadata"])
def test_every_field_is_described(path: str) -> None:
    assert NODES[path].get("description", "").endswith("."), path


def test_every_node_has_one_type_and_nothing_that_is_not_structural() -> None:
    for path, node in NODES.items():
        assert isinstance(node.get("type"), str), path
        assert not {"$ref", "anyOf", "oneOf", "allOf", "not", "title", "const", "additionalProperties"} & set(node), (
            path
        )


def test_every_list_and_text_is_bounded() -> None:
    for path, node in NODES.items():
        if node["type"] == "array":
            assert "maxItems" in node, path
        if node["type"] == "string" and path not in (".apiVersion", ".kind"):
            assert {"maxLength", "enum"} & set(node) or node.get("format") == "date-time", path


def test_exclusive_bounds_are_flags() -> None:
    rate = NODES[".spec.optimizer.learningRate"]
    assert (rate["minimum"], rate["exclusiveMinimum"], rate["maximum"]) == (0, True, 1)
    fraction = NODES[".spec.validation.fraction"]
    assert (fraction["exclusiveMinimum"], fraction["exclusiveMaximum"]) == (True, True)


def test_defaults_hold_no_null_and_are_valid_themselves() -> None:
    assert NODES[".spec.checkpoints.every"]["default"] == {"steps": 100}
    assert NODES[".spec.batch"]["default"] == {"packing": "Auto"}
    for path, node in NODES.items():
        assert "null" not in json.dumps(node.get("default", {})), path


def test_the_columns_of_kubectl_get_lead_to_fields() -> None:
    columns = CRD["spec"]["versions"][0]["additionalPrinterColumns"]
    assert [column["name"] for column in columns] == [
        "State", "Phase", "Step", "Progress", "Loss", "Restarts", "Checkpoint", "Age",
    ]  # fmt: skip
    for column in columns[:-1]:
        node = NODES[column["jsonPath"]]
        assert column["type"] == ("date" if node.get("format") == "date-time" else node["type"])


def test_only_the_name_is_judged_at_the_root() -> None:
    [rule] = SERVER.schema["x-kubernetes-validations"]
    assert "self.metadata.name" in rule["rule"]
    assert "spec" not in rule["rule"]


def test_a_union_of_two_types_cannot_be_generated() -> None:
    from sft_api.base import ApiModel

    class Either(ApiModel):
        value: int | str

    with pytest.raises(TypeError, match="a union of 2 types"):
        structural(Either)


@pytest.mark.parametrize("case", BAD)
def test_an_api_server_refuses_what_validate_refuses(case: str) -> None:
    assert SERVER.refusals(document(BAD[case][0]))


@pytest.mark.parametrize("case", GOOD)
def test_an_api_server_takes_what_validate_takes(case: str) -> None:
    assert SERVER.refusals(document(GOOD[case])) == []


CHANGES: dict[str, Any] = {
    "spec.model.uri": "hf://ibm-granite/granite-3.1-8b-base",
    "spec.model.revision": "main",
    "spec.recipe": "TULU",
    "spec.strategy": "ByLength",
    "spec.phases[0].name": "other",
    "spec.phases[0].data[0].format": "Pretraining",
    "spec.epochs": 2,
    "spec.validation": {"fraction": 0.1},
    "spec.batch.effectiveBatchSize": 64,
    "spec.optimizer.schedule": "Cosine",
    "spec.trainer.nodes": 2,
    "spec.preparedData": {"uri": "s3://prepared/x"},
    "spec.checkpoints.uri": "s3://lab/runs/other",
    "spec.checkpoints.every": {"minutes": 5},
    "spec.checkpoints.export": "End",
    "spec.seed": 1,
}


@pytest.mark.parametrize("path", CHANGES)
def test_a_change_is_refused_as_immutable(path: str) -> None:
    field = ".".join(path.split("[")[0].split(".")[: 3 if path.startswith("spec.checkpoints") else 2])
    assert SERVER.refusals(document({path: CHANGES[path]}), document())[0].endswith(f": {field} is immutable")


@pytest.mark.parametrize("path", ["spec.epochs", "spec.validation", "spec.preparedData"])
def test_taking_out_an_optional_field_is_refused_as_immutable(path: str) -> None:
    assert SERVER.refusals(document(), document({path: CHANGES[path]}))[0].endswith(f": {path} is immutable")


def test_every_field_of_the_spec_is_tried_for_immutability() -> None:
    tried = {path.split("[")[0].split(".")[1] for path in CHANGES}
    assert tried == set(structural(SFTJobSpec)["properties"])


def test_the_order_of_phases_is_immutable() -> None:
    turned = document()
    turned["spec"]["phases"].reverse()
    assert SERVER.refusals(turned, document()) == [".spec: spec.phases is immutable"]


def test_what_to_keep_and_labels_may_change() -> None:
    new = document({"spec.checkpoints.keep": {"last": 5, "phaseEnds": False}, "metadata.labels": {"team": "lab"}})
    assert SERVER.refusals(new, document()) == []


def test_writing_a_default_out_is_no_change() -> None:
    new = document({"spec.seed": 42, "spec.checkpoints.every": {"steps": 100}, "spec.strategy": "Stacked"})
    assert SERVER.refusals(new, document()) == []


PARTS = [part for changes in (*GOOD.values(), *(bad for bad, _ in BAD.values()), CHANGES) for part in changes.items()]
VALUES = [None if value is GONE else value for _, value in PARTS]
OWN: dict[str, list[Any]] = {
    path: [value for other, value in PARTS if other == path and value is not GONE]
    for path, value in PARTS
    if value is not GONE and (path.startswith("spec.") or path == "metadata.name")
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), case=st.sampled_from(sorted(GOOD)))
def test_api_server_and_validate_agree_on_what_is_neither_here_nor_there(data: st.DataObject, case: str) -> None:
    """Good manifests, changed in three places with parts of the others."""
    mixed = document(GOOD[case])
    for _ in range(3):
        path = data.draw(st.sampled_from(sorted(OWN)))
        value = data.draw(st.sampled_from(OWN[path]) | st.sampled_from(VALUES))
        with contextlib.suppress(AttributeError, TypeError, LookupError):  # no such place after the first change
            change(mixed, path, copy.deepcopy(value))
    found: list[Problem] = []
    try:
        parse_job(mixed)
    except ManifestError as error:
        found = error.problems
    refused = SERVER.refusals(mixed)
    assert bool(refused) == bool(found), (refused, found)
