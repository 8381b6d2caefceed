"""Overrides merged into a manifest as strategic merge patches do it: mappings by key, named things in lists by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIST_KEYS = {
    "containers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
"""The lists of our pods that Kubernetes would merge, and by which field. Others are added to."""


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `override` in it, which wins. What is not a mapping or a list is replaced; neither is changed."""
    result = dict(base)
    for key, value in override.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merged(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            result[key] = merged_list(old, value, LIST_KEYS.get(key))
        else:
            result[key] = value
    return result


def merged_list(base: list[Any], override: list[Any], by: str | None) -> list[Any]:
    if by is None or not all(isinstance(element, Mapping) and by in element for element in [*base, *override]):
        return [*base, *override]
    result = {element[by]: element for element in base}
    for element in override:
        old = result.get(element[by])
        result[element[by]] = element if old is None or is_another_source(old, element) else merged(old, element)
    return list(result.values())


def is_another_source(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """A volume or variable with another source is replaced: two sources in one would be refused."""
    return set(old) - {"name"} != set(new) - {"name"} and ("value" in old or "valueFrom" in old or is_volume(old))


def is_volume(element: Mapping[str, Any]) -> bool:
    return any(kind in element for kind in ("emptyDir", "configMap", "persistentVolumeClaim"))
