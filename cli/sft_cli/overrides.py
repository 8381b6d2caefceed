"""`--set spec.path=value`: changes one field of a manifest before it is validated."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from typing import Any

import yaml

STEP = re.compile(r"(?:^|(?<=.)\.)([A-Za-z][A-Za-z0-9_-]*)|\[([0-9]+)\]")


class BadOverride(ValueError):
    """A `--set` that cannot be followed."""


def apply_override(document: object, override: str, loader: type[yaml.SafeLoader]) -> object:
    """A copy of `document` with the field set; `null` removes it. Fields on the way are made where they are missing.

    A list may grow by one: `spec.phases[2].name` where there are two phases begins a third. Raises BadOverride.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise BadOverride(f"{override!r} has no '='; write spec.path=value, as spec.batch.effectiveBatchSize=64")
    steps = parse_path(path.strip())
    try:
        value = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise BadOverride(f"the value of {path} is not YAML; quote it: {path}='\"…\"' ({one_line(error)})") from error
    root = copy.deepcopy(document)
    node: Any = root
    for position, (step, following) in enumerate(pairwise(steps)):
        node = descend(node, step, spelled(steps[: position + 1]), [] if isinstance(following, int) else {})
    put(node, steps[-1], spelled(steps), value)
    return root


def parse_path(path: str) -> list[str | int]:
    """`spec.phases[1].data[0].uri` as its steps. Raises BadOverride."""
    steps: list[str | int] = []
    position = 0
    while position < len(path):
        match = STEP.match(path, position)
        if match is None:
            raise BadOverride(f"{path!r} is no path of a field; write it as spec.phases[1].data[0].uri")
        steps.append(match[1] if match[1] is not None else int(match[2]))
        position = match.end()
    if len(steps) < 2 or steps[0] not in ("spec", "metadata"):
        raise BadOverride(f"{path!r} is not a field under spec or metadata; write it as spec.batch.effectiveBatchSize")
    return steps


def descend(node: Any, step: str | int, place: str, missing: Any) -> Any:
    check_container(node, step, place)
    if isinstance(step, int):
        if step == len(node):
            node.append(missing)
        return node[step]
    if node.get(step) is None:
        node[step] = missing
    return node[step]


def put(node: Any, step: str | int, place: str, value: Any) -> None:
    check_container(node, step, place)
    if isinstance(step, int) and step == len(node):
        node.append(value)
    elif value is None:
        node.pop(step, None) if isinstance(step, str) else node.pop(step)
    else:
        node[step] = value


def check_container(node: Any, step: str | int, place: str) -> None:
    if isinstance(step, str):
        if not isinstance(node, dict):
            raise BadOverride(f"{place}: there is no object to set a field of; an element of a list is written [0]")
        return
    if not isinstance(node, list):
        raise BadOverride(f"{place}: there is no list here")
    if step > len(node):
        raise BadOverride(f"{place}: the list has {len(node)} elements; the next is [{len(node)}]")


def spelled(steps: list[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
