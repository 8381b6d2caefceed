"""`--set`: fields by path."""

from __future__ import annotations

from typing import Any

import pytest

from sft_cli.manifests import ManifestLoader
from sft_cli.overrides import BadOverride, apply_override


def document() -> dict[str, Any]:
    return {"metadata": {"name": "a"}, "spec": {"epochs": 3, "phases": [{"name": "p", "data": [{"uri": "file://x"}]}]}}


def changed(override: str) -> Any:
    original = document()
    made = apply_override(original, override, ManifestLoader)
    assert original == document()
    return made


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("spec.epochs=1", ["spec", "epochs"], 1),
        ("spec.optimizer.learningRate=2e-5", ["spec", "optimizer", "learningRate"], 2e-5),
        (
            "spec.phases[0].data[0].uri=s3://lab/a=b.jsonl",
            ["spec", "phases", 0, "data", 0, "uri"],
            "s3://lab/a=b.jsonl",
        ),
        ("spec.phases[1].name=q", ["spec", "phases", 1, "name"], "q"),
        ("spec.optimizer.betas=[0.9, 0.95]", ["spec", "optimizer", "betas"], [0.9, 0.95]),
        ("spec.checkpoints.every={minutes: 5}", ["spec", "checkpoints", "every"], {"minutes": 5}),
        ('metadata.name="7"', ["metadata", "name"], "7"),
        ("spec.phases[1].data[0].uri=file://y", ["spec", "phases", 1, "data", 0, "uri"], "file://y"),
    ],
)
def test_the_field_at_the_path_takes_the_value(override: str, path: list[str | int], value: object) -> None:
    node = changed(override)
    for step in path:
        node = node[step]
    assert node == value


def test_null_removes_the_field() -> None:
    assert changed("spec.epochs=null")["spec"] == {"phases": document()["spec"]["phases"]}
    assert changed("spec.phases[0]=null")["spec"]["phases"] == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("spec.epochs", "has no '='"),
        ("epochs=3", "is not a field under spec or metadata"),
        ("status.state=Done", "is not a field under spec or metadata"),
        (".spec.epochs=3", "is no path of a field"),
        ("spec..epochs=3", "is no path of a field"),
        ("spec.phases[x].name=q", "is no path of a field"),
        ("spec.phases[3].name=q", r"the list has 1 elements; the next is \[1\]"),
        ("spec.phases.name=q", "there is no object to set a field of"),
        ("spec.epochs[0]=3", "there is no list here"),
        ("spec.epochs={", "is not YAML; quote it"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(override: str, message: str) -> None:
    with pytest.raises(BadOverride, match=message):
        changed(override)
