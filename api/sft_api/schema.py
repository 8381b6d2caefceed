"""The models as a structural schema: what the CRD, the reference and the messages of `sft validate` are made from.

pydantic's JSON Schema with references inlined and `anyOf [X, null]` collapsed to an optional X. Any other union
raises: an API server could not take it.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from sft_api.base import ApiModel

Schema = dict[str, Any]


@cache
def structural(model: type[ApiModel]) -> Schema:
    """The schema of `model`. Shared: copy it before changing it."""
    generated = model.model_json_schema(by_alias=True, mode="validation")
    schema = inlined(generated, generated.get("$defs", {}))
    schema.pop("$defs", None)
    return schema


def inlined(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """One node, made structural. What stands beside a reference (its description, its default) wins over the target."""
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        return inlined({**target, **{key: value for key, value in node.items() if key != "$ref"}}, definitions)
    if "anyOf" in node:
        return inlined(without_null(node), definitions)
    if unknown := {"oneOf", "allOf", "not", "prefixItems"} & set(node):
        raise TypeError(f"{sorted(unknown)} cannot stand in a structural schema: {node}")
    result = {key: value for key, value in node.items() if key not in ("title", "additionalProperties", "const")}
    if "const" in node:
        result["enum"] = [node["const"]]
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "properties" in result:
        result["properties"] = {name: inlined(child, definitions) for name, child in node["properties"].items()}
    if "items" in result:
        result["items"] = inlined(node["items"], definitions)
    if isinstance(values := node.get("additionalProperties"), dict):
        result["additionalProperties"] = inlined(values, definitions)
    return result


def without_null(node: Schema) -> Schema:
    """`anyOf [X, null]` as X; `default: null` goes with it, for it means that there is none."""
    choices = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
    if len(choices) != 1:
        raise TypeError(f"a union of {len(choices)} types cannot stand in a structural schema: {node}")
    beside = {key: value for key, value in node.items() if key != "anyOf" and (key, value) != ("default", None)}
    return {**choices[0], **beside}


def model_of(annotation: Any) -> type[ApiModel] | None:
    """The model in `Model`, `Model | None`, `list[Model]` and their Annotated forms; none in a plain field."""
    origin = get_origin(annotation)
    if origin is Annotated or origin is list:
        return model_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return next((model for choice in get_args(annotation) if (model := model_of(choice))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, ApiModel) else None


def nested_models(model: type[ApiModel]) -> dict[str, type[ApiModel]]:
    """The fields of `model`, by their name on the wire, that hold a model or a list of one."""
    fields = {field.alias or name: model_of(field.annotation) for name, field in model.model_fields.items()}
    return {name: nested for name, nested in fields.items() if nested is not None}
