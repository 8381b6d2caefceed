"""From a parsed document to an SFTJob, or to everything that is wrong with it, in its author's words.

Reading YAML is the caller's. What passes here passes an API server that has our CRD, and the other way round.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sft_api.base import ApiModel
from sft_api.job import SFTJob
from sft_api.rules import rules_of
from sft_api.schema import Schema, nested_models, structural
from sft_api.wording import allowed_fields, expected, listing, shown

Location = tuple[int | str, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a manifest."""

    path: str
    """The field, in the author's spelling: `spec.phases[1].data[0].uri`; empty for the document as a whole."""
    message: str
    """What was given, what is allowed."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ManifestError(ValueError):
    """A document that is no valid SFTJob, with everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]):
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = list(problems)


def parse_job(document: object) -> SFTJob:
    """The SFTJob that `document` (mappings, lists and scalars, as YAML gives them) says. Raises ManifestError."""
    if not isinstance(document, Mapping):
        raise ManifestError([Problem("", f"{shown(document)} is no SFTJob; allowed: {expected(structural(SFTJob))}")])
    given = as_json(document)
    problems = []
    try:
        parsed = SFTJob.model_validate_json(json.dumps(given), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = [problem_of(found["loc"], found["type"], found["input"]) for found in error.errors()]
    problems.extend(broken_rules(SFTJob, given, ""))
    if problems:
        raise ManifestError(problems)
    return parsed


def as_json(document: object) -> Any:
    """`document` as an API server gets it: dates are text, keys are text, and a field that is null is not there."""
    try:
        return without_nulls(json.loads(json.dumps(document, default=str)), structural(SFTJob))
    except (ValueError, TypeError, RecursionError) as error:
        raise ManifestError([Problem("", f"cannot be read as plain data: {error}")]) from error


def without_nulls(node: Any, schema: Schema) -> Any:
    """A null stays where it stands for a field that does not exist, to be refused with it."""
    if isinstance(node, list):
        return [without_nulls(element, schema.get("items", {})) for element in node]
    if not isinstance(node, dict):
        return node
    kept = {name: value for name, value in node.items() if value is not None or is_unknown(name, schema)}
    return {name: without_nulls(value, field_of(schema, name)) for name, value in kept.items()}


def is_unknown(name: str, schema: Schema) -> bool:
    return "properties" in schema and name not in schema["properties"]


def field_of(schema: Schema, name: str) -> Schema:
    """The schema of a field; an empty one for what has none."""
    found: Schema = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
    return found


def broken_rules(model: type[ApiModel], given: Mapping[str, Any], path: str) -> Iterator[Problem]:
    """What the rules across fields find in `given`, and in what it holds."""
    for rule in rules_of(model):
        for field, message in rule.check(given):
            yield Problem(".".join(part for part in (path, field) if part), message)
    for name, nested in nested_models(model).items():
        place = f"{path}.{name}" if path else name
        value = given.get(name)
        if isinstance(value, Mapping):
            yield from broken_rules(nested, value, place)
        for index, element in enumerate(value if isinstance(value, list) else []):
            if isinstance(element, Mapping):
                yield from broken_rules(nested, element, f"{place}[{index}]")


def problem_of(location: Location, kind: str, given: object) -> Problem:
    """What pydantic found, as a person would say it."""
    path = spelled(location)
    if kind == "extra_forbidden":
        return Problem(path, unknown_field(location))
    allowed = expected(schema_at(location))
    if kind == "missing":
        return Problem(path, f"is required and missing; give {allowed}")
    return Problem(path, f"{shown(given)} is not allowed; allowed: {allowed}{suggestion(location, given)}")


def spelled(location: Location) -> str:
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location]
    return "".join(steps).removeprefix(".")


def schema_at(location: Location) -> Schema:
    """The schema of the field at `location`; an empty one for what has none."""
    node = structural(SFTJob)
    for step in location:
        node = node.get("items", {}) if isinstance(step, int) else field_of(node, step)
    return node


def unknown_field(location: Location) -> str:
    *parents, name = location
    schema = schema_at(tuple(parents))
    owner = spelled(tuple(parents)) or "an SFTJob"
    close = difflib.get_close_matches(str(name), schema.get("properties", {}), n=1, cutoff=0.6)
    if close:
        hint = f"did you mean {close[0]}? "
    else:
        elsewhere = sorted(places_of(str(name), structural(SFTJob)["properties"]["spec"], "spec"), key=len)
        hint = f"did you mean {listing(elsewhere[:2], 'or')}? " if elsewhere else ""
    return f"is no field of {owner}; {hint}allowed: {', '.join(allowed_fields(schema))}"


def places_of(name: str, schema: Schema, path: str) -> Iterator[str]:
    """Where in the spec a field of this name stands."""
    for field, child in schema.get("properties", {}).items():
        place = f"{path}.{field}"
        if field.lower() == name.lower():
            yield place
        yield from places_of(name, child.get("items", child), f"{place}[…]" if "items" in child else place)


def suggestion(location: Location, given: object) -> str:
    schema = schema_at(location)
    if not isinstance(given, str):
        return ""
    if "enum" in schema:
        by_lower_case = {choice.lower(): choice for choice in schema["enum"]}
        close = difflib.get_close_matches(given.lower(), by_lower_case, n=1, cutoff=0.5)
        return f"; did you mean {by_lower_case[close[0]]}?" if close else ""
    if schema.get("type") in ("integer", "number", "boolean") and is_plain(given, schema["type"]):
        return "; write it without quotes"
    return ""


def is_plain(text: str, kind: str) -> bool:
    """Whether `text` would be a value of this type if it were not quoted."""
    if kind == "boolean":
        return text in ("true", "false")
    try:
        int(text) if kind == "integer" else float(text)
    except ValueError:
        return False
    return True
