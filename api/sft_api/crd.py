"""The CustomResourceDefinition, generated: `python -m sft_api.crd` writes crds/sftjobs.sftjob.dev.yaml."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_api import generated
from sft_api.base import ApiModel
from sft_api.job import GROUP, JOB_NAME_PATTERN, KIND, VERSION, SFTJob
from sft_api.rules import rules_of
from sft_api.schema import Schema, nested_models, structural
from sft_api.spec import SFTJobSpec
from sft_api.status import SFTJobStatus
from sft_api.wording import PHRASES

PLURAL = "sftjobs"
FILE = Path("crds", f"{PLURAL}.{GROUP}.yaml")
HEADER = "# Generated from sft_api by `python -m sft_api.crd`. Do not edit.\n"

REASON = '.status.conditions[?(@.type=="Succeeded")].reason'
"""Not with `-o wide` alone: State says that a job failed, and this why."""

MUTABLE = {"spec.checkpoints.keep", "spec.lifecycle", "spec.suspend"}
"""What may change while a job exists. The rest says which result the job's name stands for."""


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get sft`."""

    name: str
    type: str
    path: str
    description: str
    wide: bool = False
    """Shown with `-o wide` alone."""


COLUMNS = [
    Column("State", "string", ".status.state", "Where the job stands"),
    Column("Phase", "string", ".status.phase.name", "The phase being trained"),
    Column("Step", "integer", ".status.progress.step", "Optimizer steps done"),
    Column("Progress", "integer", ".status.progress.percent", "Steps done of all steps, in percent"),
    Column("Loss", "number", ".status.progress.loss", "Mean cross-entropy of the last step"),
    Column("Restarts", "integer", ".status.restarts", "Restarts after failures"),
    Column("Checkpoint", "date", ".status.checkpoint.time", "Age of the newest committed checkpoint"),
    Column("Queue", "string", ".spec.scheduling.queue", "The queue that the gang waits in", wide=True),
    Column("GPU-Seconds", "number", ".status.gpuSeconds", "GPU time held, over all attempts", wide=True),
    Column("Goodput", "number", ".status.goodput", "Share of the time held that went into steps", wide=True),
    Column("Reason", "string", REASON, "Why the job failed, or how it goes"),
    Column("Age", "date", ".metadata.creationTimestamp", "Age of the job"),
]

NAME_RULE = {
    # The one rule at the root: rules there are judged anew at every update, and a name never changes.
    "rule": f"size(self.metadata.name) <= 40 && self.metadata.name.matches('{JOB_NAME_PATTERN}')",
    "message": f"metadata.name: {PHRASES[JOB_NAME_PATTERN]}",
}


def custom_resource_definition() -> dict[str, Any]:
    """The manifest, as plain data."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["sft"],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [version()],
        },
    }


def version() -> dict[str, Any]:
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [printer_column(column) for column in COLUMNS],
        "schema": {"openAPIV3Schema": root_schema()},
    }


def printer_column(column: Column) -> dict[str, Any]:
    shown = {"name": column.name, "type": column.type, "jsonPath": column.path, "description": column.description}
    return shown | ({"priority": 1} if column.wide else {})


def root_schema() -> Schema:
    whole = structural(SFTJob)
    spec = guarded(deepcopy(structural(SFTJobSpec)), SFTJobSpec)
    forbid_changes(spec, SFTJobSpec, "spec")
    # Of a new object too, so that what waits for it (kstatus: Flux, Helm) does not take it for done.
    status = structural(SFTJobStatus) | {"default": {"observedGeneration": 0}}
    described = {
        "apiVersion": {"type": "string", "description": whole["properties"]["apiVersion"]["description"]},
        "kind": {"type": "string", "description": whole["properties"]["kind"]["description"]},
        # An API server knows metadata itself, and takes no more than its type here.
        "metadata": {"type": "object"},
        "spec": for_api_server(spec),
        "status": for_api_server(status),
    }
    return {
        "type": "object",
        "description": whole["description"],
        "required": ["metadata", "spec"],
        "properties": described,
        "x-kubernetes-validations": [NAME_RULE],
    }


def guarded(schema: Schema, model: type[ApiModel]) -> Schema:
    """`schema` with the rules across fields of `model`, and of the models it holds."""
    validations = [{"rule": rule.cel, "message": rule.message} for rule in rules_of(model) if rule.cel]
    if validations:
        schema["x-kubernetes-validations"] = validations
    for name, nested in nested_models(model).items():
        child = schema["properties"][name]
        guarded(child.get("items", child), nested)
    return schema


def forbid_changes(schema: Schema, model: type[ApiModel], path: str) -> None:
    """Adds the rules that keep every field of `model` as it is, except what is MUTABLE.

    They stand at the parent, for a rule of an optional field itself is not asked when the field comes or goes.
    """
    nested = nested_models(model)
    rules = schema.setdefault("x-kubernetes-validations", [])
    for name, child in schema["properties"].items():
        place = f"{path}.{name}"
        if place in MUTABLE:
            continue
        if any(mutable.startswith(f"{place}.") for mutable in MUTABLE):
            forbid_changes(child, nested[name], place)
            continue
        always_there = name in schema.get("required", []) or "default" in child
        rules.append({"rule": unchanged(name, always_there), "message": f"{place} is immutable"})


def unchanged(name: str, always_there: bool) -> str:
    if always_there:
        return f"self.{name} == oldSelf.{name}"
    return f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"


def for_api_server(schema: Schema) -> Schema:
    """The dialect of apiextensions/v1: exclusive bounds are booleans, a default holds no null, and what may be a whole
    number or text has no type."""
    result: Schema = {}
    for key, value in schema.items():
        match key:
            case "exclusiveMinimum" | "exclusiveMaximum":
                result[key.removeprefix("exclusive").lower()] = value
                result[key] = True
            case "default":
                result[key] = without_nulls(value)
            case "properties":
                result[key] = {name: for_api_server(child) for name, child in value.items()}
            case "items" | "additionalProperties":
                result[key] = for_api_server(value)
            case "type" if schema.get("x-kubernetes-int-or-string"):
                pass
            case _:
                result[key] = value
    return result


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return value


def as_yaml() -> str:
    """The text of the checked-in file."""
    import yaml  # here alone: whatever imports sft_api needs no YAML

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    text: str = yaml.dump(custom_resource_definition(), Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)
    return HEADER + text


if __name__ == "__main__":
    generated.main(FILE, as_yaml(), "sft_api.crd")
