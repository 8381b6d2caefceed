"""The smallest valid manifest, and changes to it."""

from __future__ import annotations

import copy
import re
from typing import Any

GONE = ...
"""In place of a value: the field is taken out."""


def document(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The smallest valid SFTJob with `changes`: values by path, as `spec.phases[0].epochs`."""
    smallest: dict[str, Any] = {
        "apiVersion": "sftjob.dev/v1alpha1",
        "kind": "SFTJob",
        "metadata": {"name": "granite"},
        "spec": {
            "model": {"uri": "hf://ibm-granite/granite-3.1-2b-base"},
            "phases": [
                {"name": "instruct", "data": [{"uri": "s3://lab/instruct.jsonl"}]},
                {"name": "skills", "data": [{"uri": "s3://lab/skills.jsonl"}]},
            ],
            "checkpoints": {"uri": "s3://lab/runs/granite"},
        },
    }
    for path, value in (changes or {}).items():
        change(smallest, path, copy.deepcopy(value))
    return smallest


def change(node: Any, path: str, value: Any) -> None:
    *parents, last = [int(index) if index else name for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)]
    for step in parents:
        node = node[step] if isinstance(step, int) else node.setdefault(step, {})
    if value is GONE:
        del node[last]
    elif isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
