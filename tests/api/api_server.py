"""What an API server does with an object of our CRD: defaults, schema, CEL. A small model of it, for tests.

Real here: the generated CRD, and CEL as cel-python evaluates it, with RE2 as Go has it. Modelled: the part of
apiextensions/v1 that our schema uses. Whatever else stands in a schema raises.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import celpy
import re2

CEL = celpy.Environment()  # made once: it raises Python's recursion limit, which Hypothesis watches
KNOWN = {
    *("type", "description", "properties", "required", "items", "enum", "pattern", "format", "default"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "minItems", "maxItems", "additionalProperties", "maxProperties"),
    *("x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    *("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"),
}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


class ApiServer:
    """An API server that has the CRD."""

    def __init__(self, crd: dict[str, Any]):
        [version] = crd["spec"]["versions"]
        self.schema = version["schema"]["openAPIV3Schema"]
        names = crd["spec"]["names"]
        self.type = (f"{crd['spec']['group']}/{version['name']}", names["kind"])

    def refusals(self, given: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
        """What is wrong with `given`, to be created, or to replace `old`; CEL is asked only where the schema holds."""
        new = with_defaults(self.schema, without_nulls(self.schema, given))
        if (new.get("apiVersion"), new.get("kind")) != self.type:
            return ["no such kind"]
        found = list(schema_refusals(self.schema, new, ""))
        before = with_defaults(self.schema, without_nulls(self.schema, old)) if old is not None else None
        return found or list(rule_refusals(self.schema, new, before, ""))


def without_nulls(schema: dict[str, Any], node: Any) -> Any:
    """A field that is null is not there, but one that is unknown is refused all the same."""
    if isinstance(node, list):
        return [without_nulls(schema.get("items", {}), element) for element in node]
    if not isinstance(node, dict):
        return node
    fields = schema.get("properties")
    kept = {name: value for name, value in node.items() if value is not None or (fields and name not in fields)}
    values = schema.get("additionalProperties", {})
    return {name: without_nulls((fields or {}).get(name, values), value) for name, value in kept.items()}


def with_defaults(schema: dict[str, Any], node: Any) -> Any:
    if isinstance(node, list):
        return [with_defaults(schema.get("items", {}), element) for element in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    for name, child in schema.get("properties", {}).items():
        if name not in node and "default" in child:
            node[name] = copy.deepcopy(child["default"])
        if name in node:
            node[name] = with_defaults(child, node[name])
    return node


def schema_refusals(schema: dict[str, Any], node: Any, path: str) -> Iterator[str]:
    assert set(schema) <= KNOWN, f"{path}: {set(schema) - KNOWN} is not modelled"
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    kinds = (int, str) if schema.get("x-kubernetes-int-or-string") else TYPES[schema["type"]]
    if not isinstance(node, kinds) or (isinstance(node, bool) and bool not in kinds):
        yield f"{path}: must be of type {schema.get('type', 'integer or string')}"
        return
    if "enum" in schema and node not in schema["enum"]:
        yield f"{path}: supported values: {schema['enum']}"
    if isinstance(node, str):
        yield from string_refusals(schema, node, path)
    elif isinstance(node, dict):
        yield from object_refusals(schema, node, path)
    elif isinstance(node, list):
        yield from list_refusals(schema, node, path)
    elif not isinstance(node, bool):
        yield from number_refusals(schema, node, path)


def string_refusals(schema: dict[str, Any], text: str, path: str) -> Iterator[str]:
    yield from outside(len(text), schema.get("minLength"), schema.get("maxLength"), path)
    if "pattern" in schema and not re2.search(schema["pattern"], text):
        yield f"{path}: should match {schema['pattern']}"


def object_refusals(schema: dict[str, Any], node: dict[str, Any], path: str) -> Iterator[str]:
    yield from (f"{path}.{name}: required" for name in schema.get("required", []) if name not in node)
    yield from outside(len(node), None, schema.get("maxProperties"), path)
    for name, value in node.items():
        child = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if child is not None:
            yield from schema_refusals(child, value, f"{path}.{name}")
        elif path != ".metadata":
            yield f"{path}.{name}: unknown field"  # kubectl asks for strict validation


def list_refusals(schema: dict[str, Any], node: list[Any], path: str) -> Iterator[str]:
    yield from outside(len(node), schema.get("minItems"), schema.get("maxItems"), path)
    for index, element in enumerate(node):
        yield from schema_refusals(schema["items"], element, f"{path}[{index}]")
    if schema.get("x-kubernetes-list-type") == "map":
        keys = [[element.get(key) for key in schema["x-kubernetes-list-map-keys"]] for element in mappings(node)]
        yield from (f"{path}: duplicate value: {key}" for index, key in enumerate(keys) if key in keys[:index])


def mappings(node: list[Any]) -> list[dict[str, Any]]:
    return [element for element in node if isinstance(element, dict)]


def number_refusals(schema: dict[str, Any], number: float, path: str) -> Iterator[str]:
    if number != number:
        yield f"{path}: JSON has no such number"
    yield from outside(number, schema.get("minimum"), schema.get("maximum"), path)
    for limit in ("minimum", "maximum"):
        if schema.get(f"exclusive{limit.title()}") and number == schema[limit]:
            yield f"{path}: must not be {number}"


def outside(number: float, low: float | None, high: float | None, path: str) -> Iterator[str]:
    if (low is not None and number < low) or (high is not None and number > high):
        yield f"{path}: must be from {low} to {high}"


def rule_refusals(schema: dict[str, Any], new: Any, old: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        transition = "oldSelf" in rule["rule"]
        if not (transition and old is None) and not holds(rule["rule"], new, old):
            yield f"{path}: {rule['message']}"
    if isinstance(new, dict):
        for name, child in schema.get("properties", {}).items():
            if name in new:
                before = old.get(name) if isinstance(old, dict) else None
                yield from rule_refusals(child, new[name], before, f"{path}.{name}")
    for index, element in enumerate(new if isinstance(new, list) else []):
        # The elements of an atomic list have no old selves.
        yield from rule_refusals(schema["items"], element, None, f"{path}[{index}]")


def holds(rule: str, new: Any, old: Any) -> bool:
    """Whether the rule is true; an error in it is a refusal, as in an API server."""
    given = {"self": celpy.json_to_cel(new), "oldSelf": celpy.json_to_cel(old)}
    try:
        return bool(program(rule).evaluate(given))
    except celpy.CELEvalError:
        return False


@functools.cache
def program(rule: str) -> Any:
    return CEL.program(CEL.compile(rule))
