from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from sft_api.crd import FILE, MUTABLE, REASON, as_yaml, custom_resource_definition
from sft_api.manifest import ManifestError, Problem, parse_job
from sft_api.schema import structural
from sft_api.spec import SFTJobSpec
from tests.api.api_server import ApiServer
from tests.api.jobs import document
from tests.api.mixed import mixed_documents
from tests.api.tables import BAD, CHANGES, GOOD, LABELS, MAY_CHANGE, UNSEEN

ROOT = Path(__file__).parents[2]
CRD = custom_resource_definition()
SERVER = ApiServer(CRD)


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


NODES = dict(nodes(SERVER.schema))


def test_the_checked_in_crd_is_current() -> None:
    assert (ROOT / FILE).read_text() == as_yaml(), "run `python -m sft_api.crd`"


def test_the_crd_fits_into_an_annotation_of_kubectl() -> None:
    assert len(json.dumps(CRD)) < 256 * 1024
    assert (ROOT / FILE).stat().st_size < 256 * 1024


def test_the_yaml_says_what_was_generated() -> None:
    assert yaml.safe_load(as_yaml()) == CRD


@pytest.mark.parametrize("path", [path for path in NODES if path and path[-1] not in "]}" and path != ".metadata"])
def test_every_field_is_described(path: str) -> None:
    assert NODES[path].get("description", "").endswith("."), path


def test_every_node_has_one_type_and_nothing_that_is_not_structural() -> None:
    for path, node in NODES.items():
        untyped = {"x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"} & set(node)
        assert isinstance(node.get("type"), str) != bool(untyped), path
        assert not {"$ref", "anyOf", "oneOf", "allOf", "not", "title", "const"} & set(node), path
        assert not {"properties", "additionalProperties"} <= set(node), path


def test_every_list_mapping_and_text_is_bounded() -> None:
    for path, node in NODES.items():
        kind = node.get("type", "string" if "pattern" in node else "opaque")
        if kind == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path
        if kind == "string" and path not in (".apiVersion", ".kind"):
            assert {"maxLength", "enum"} & set(node) or node.get("format") == "date-time", path


def test_only_a_pods_own_spec_is_left_to_kubernetes() -> None:
    opaque = [path for path, node in NODES.items() if "x-kubernetes-preserve-unknown-fields" in node]
    assert opaque == [".spec.trainer.podTemplate.spec{}"]


def test_a_quantity_is_a_number_or_text() -> None:
    assert NODES[".spec.trainer.resources.limits{}"]["x-kubernetes-int-or-string"]
    assert NODES[".spec.trainer.sharedMemory"]["minimum"] == 1


def test_a_new_object_has_a_status_that_is_behind_its_spec() -> None:
    assert NODES[".status"]["default"] == {"observedGeneration": 0}


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
    assert [column["name"] for column in columns if "priority" not in column] == [
        "State", "Phase", "Step", "Progress", "Loss", "Restarts", "Checkpoint", "Reason", "Age",
    ]  # fmt: skip
    assert [column["name"] for column in columns if "priority" in column] == ["Queue", "GPU-Seconds", "Goodput"]
    for column in columns:
        if column["jsonPath"] in (REASON, ".metadata.creationTimestamp"):
            continue
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


@pytest.mark.parametrize("case", UNSEEN)
def test_what_an_api_server_cannot_see_it_takes(case: str) -> None:
    """Were it to see it, the rule should be said in CEL."""
    assert SERVER.refusals(document(UNSEEN[case][0])) == []


@pytest.mark.parametrize("case", GOOD)
def test_an_api_server_takes_what_validate_takes(case: str) -> None:
    assert SERVER.refusals(document(GOOD[case])) == []


@pytest.mark.parametrize("path", CHANGES)
def test_a_change_is_refused_as_immutable(path: str) -> None:
    field = ".".join(path.split("[")[0].split(".")[: 3 if path.startswith("spec.checkpoints") else 2])
    assert SERVER.refusals(document({path: CHANGES[path]}), document())[0].endswith(f": {field} is immutable")


@pytest.mark.parametrize(
    "path", ["spec.epochs", "spec.validation", "spec.preparedData", "spec.checkpoints.credentials"]
)
def test_taking_out_an_optional_field_is_refused_as_immutable(path: str) -> None:
    assert SERVER.refusals(document(), document({path: CHANGES[path]}))[0].endswith(f": {path} is immutable")


def test_every_field_of_the_spec_is_tried_for_immutability() -> None:
    tried = {path.split("[")[0].split(".")[1] for path in (*CHANGES, *MAY_CHANGE) if path != LABELS}
    assert tried == set(structural(SFTJobSpec)["properties"])


def test_the_order_of_phases_is_immutable() -> None:
    turned = document()
    turned["spec"]["phases"].reverse()
    assert SERVER.refusals(turned, document()) == [".spec: spec.phases is immutable"]


@pytest.mark.parametrize("path", MAY_CHANGE)
def test_what_says_nothing_of_the_result_may_change_and_change_back(path: str) -> None:
    assert SERVER.refusals(document({path: MAY_CHANGE[path]}), document()) == []
    assert SERVER.refusals(document(), document({path: MAY_CHANGE[path]})) == []


def test_every_field_that_may_change_is_tried() -> None:
    assert set(MAY_CHANGE) - {LABELS} == MUTABLE


def test_writing_a_default_out_is_no_change() -> None:
    new = document({"spec.seed": 42, "spec.checkpoints.every": {"steps": 100}, "spec.strategy": "Stacked"})
    assert SERVER.refusals(new, document()) == []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(mixed=mixed_documents())
def test_api_server_and_validate_agree_on_what_is_neither_here_nor_there(mixed: dict[str, Any]) -> None:
    found: list[Problem] = []
    try:
        parse_job(mixed)
    except ManifestError as error:
        found = error.problems
    refused = SERVER.refusals(mixed)
    assert bool(refused) == bool(found), (refused, found)
