"""The reference of every field, generated: `python -m sft_api.reference` writes docs/api.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_api import generated
from sft_api.base import ApiModel
from sft_api.crd import MUTABLE
from sft_api.job import API_VERSION, SFTJob
from sft_api.recipes import BETAS, EPS, MAX_GRAD_NORM, PRESETS, WEIGHT_DECAY
from sft_api.rules import RULES
from sft_api.schema import Schema, nested_models, structural
from sft_api.spec import Warmup
from sft_api.wording import allowed_fields, expected

FILE = Path("docs", "api.md")
HEADER = f"""<!-- Generated from sft_api by `python -m sft_api.reference`. Do not edit. -->
# SFTJob, field by field

`apiVersion: {API_VERSION}`, `kind: SFTJob`, short name `sft`. Unknown fields are refused. `sft validate FILE…` says
everything that is wrong with a manifest at once. Once the job is in a cluster all of its spec is immutable, except
`{", ".join(sorted(MUTABLE))}`.
"""


def reference() -> str:
    """The text of docs/api.md."""
    root = structural(SFTJob)["properties"]
    parts = [HEADER, recipe_table(), rule_list()]
    parts.extend(sections(root["metadata"], "metadata"))
    parts.extend(sections(root["spec"], "spec"))
    parts.extend(sections(root["status"], "status"))
    return "\n".join(parts)


def sections(schema: Schema, path: str) -> Iterator[str]:
    """One section for the object at `path`, then one for each object in it."""
    fields = {name: child for name, child in schema["properties"].items() if not child.get("readOnly")}
    lines = [
        f"## {path}",
        "",
        schema["description"],
        "",
        "| field | type | default | allowed | meaning |",
        "|---|---|---|---|---|",
    ]
    required = schema.get("required", [])
    lines.extend(row(name, child, path, required=name in required) for name, child in fields.items())
    yield "\n".join(lines) + "\n"
    for name, child in fields.items():
        if "properties" in child:
            yield from sections(child, f"{path}.{name}")
        elif "properties" in child.get("items", {}):
            yield from sections(child["items"], f"{path}.{name}[…]")


def row(name: str, schema: Schema, path: str, *, required: bool) -> str:
    default = "required" if required else default_of(schema)
    cells = [f"`{name}`", type_of(schema), default, allowed(schema), schema["description"]]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


NOTHINGS: tuple[Any, ...] = (None, {}, [])
TYPES = {
    "string": "text",
    "object": "mapping",
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
}


def type_of(schema: Schema) -> str:
    if schema["type"] == "array":
        return f"list of {type_of(schema['items'])}"
    if schema.get("x-kubernetes-int-or-string"):
        return "whole number or text"
    return "time" if schema.get("format") == "date-time" else TYPES[schema["type"]]


def default_of(schema: Schema) -> str:
    """The schema's default; nothing where it is empty, for then its fields have defaults of their own."""
    default = without_nothings(schema.get("default"))
    return "" if default in NOTHINGS else f"`{default if isinstance(default, str) else json.dumps(default)}`"


def without_nothings(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    children = {key: without_nothings(child) for key, child in value.items()}
    return {key: child for key, child in children.items() if child not in NOTHINGS}


def allowed(schema: Schema) -> str:
    if "properties" in schema:
        return ", ".join(allowed_fields(schema))
    if schema["type"] == "array" and "properties" not in schema["items"]:
        return f"{expected(schema)}: {expected(schema['items'])}"
    return expected(schema)


def recipe_table() -> str:
    """What each recipe fills in."""
    lines = [
        "## Recipes",
        "",
        "`spec.recipe` fills in what the job leaves out, from Table 1 of “Unveiling the Secret Recipe: A Guide For",
        "Supervised Fine-Tuning Small LLMs” (ICLR 2025, arXiv 2412.13337). Every field can be given its own value.",
        "",
        "| recipe | effectiveBatchSize | learningRate | warmup | schedule | epochs |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, preset in PRESETS.items():
        size, rate, epochs = map(figure, (preset.effective_batch_size, preset.learning_rate, preset.epochs))
        lines.append(f"| `{recipe}` | {size} | {rate} | {warmup_text(preset.warmup)} | {preset.schedule} | {epochs} |")
    lines += [
        "",
        f"In all of them: betas {list(BETAS)}, eps {figure(EPS)}, weightDecay {WEIGHT_DECAY:g},",
        f"maxGradNorm {MAX_GRAD_NORM:g}. The paper also used 7,680 samples a step with LAB.",
    ]
    return "\n".join(lines) + "\n"


def figure(value: float | None) -> str:
    """A number as one writes it in a manifest: 2e-5, 3840."""
    return "required" if value is None else f"{value:g}".replace("e-0", "e-")


def warmup_text(warmup: Warmup) -> str:
    if warmup.ratio is not None:
        return f"ratio {warmup.ratio:g}"
    return f"{warmup.steps} steps" if warmup.steps else "none"


def rule_list() -> str:
    """The rules across fields."""
    places = {model: path for path, model in model_places("", SFTJob)}
    lines = [
        "## Rules across fields",
        "",
        "An API server refuses what breaks them, except those marked †: it cannot see what they are about, and so the",
        "operator says it in a condition of the job. `sft validate` says all of them.",
        "",
    ]
    lines.extend(f"- `{places[rule.model]}`{'' if rule.cel else '†'}: {rule.message}" for rule in RULES)
    return "\n".join(lines) + "\n"


def model_places(path: str, model: type[ApiModel]) -> Iterator[tuple[str, type[ApiModel]]]:
    """Every model in `model` with the path of one field that holds it: the last that is met, the shallowest."""
    for name, nested in nested_models(model).items():
        place = f"{path}.{name}" if path else name
        yield from model_places(place, nested)
        yield place, nested


if __name__ == "__main__":
    generated.main(FILE, reference(), "sft_api.reference")
