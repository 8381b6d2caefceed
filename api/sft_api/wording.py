"""What was given and what is allowed, in words: for messages and for the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from sft_api import job, pods, spec
from sft_api.schema import Schema

PHRASES = {
    spec.URI_PATTERN: "a URI: file://PATH, s3://, gs:// or az:// with bucket and path, hf://OWNER/NAME/PATH, or "
    "pvc://CLAIM/PATH",
    spec.MODEL_URI_PATTERN: "the URI of a model folder: hf://OWNER/NAME, file://PATH, s3://, gs:// or az:// with "
    "bucket and path, or pvc://CLAIM/PATH",
    spec.DATA_URI_PATTERN: "the URI of a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a glob that ends in "
    "*, ? or ]: file://PATH, s3://, gs:// or az:// with bucket and path, hf://OWNER/NAME/PATH, or pvc://CLAIM/PATH",
    spec.STORE_URI_PATTERN: "the URI of a folder to write to: file://PATH, s3://, gs:// or az:// with a bucket, or "
    "pvc://CLAIM/PATH",
    spec.NAME_PATTERN: "at most 40 lower-case letters, digits and hyphens, a hyphen neither first nor last",
    job.JOB_NAME_PATTERN: "at most 40 lower-case letters, digits and hyphens, first a letter, last no hyphen",
    pods.OBJECT_NAME_PATTERN: "the name of an object: lower-case letters, digits, hyphens and dots",
    pods.ENV_NAME_PATTERN: "letters, digits and underscores, first no digit",
    pods.DATA_KEY_PATTERN: "letters, digits, hyphens, underscores and dots",
    pods.IMAGE_PATTERN: "an image: REGISTRY/NAME:TAG",
    pods.QUANTITY_PATTERN: 'a quantity: a whole number, or text such as "0.5", 500m or 64Gi',
    pods.MEMORY_PATTERN: "an amount of memory: 16Gi, 512Mi, or bytes",
    pods.LABEL_VALUE_PATTERN: "text of at most 63 letters, digits, hyphens, underscores and dots, first and last a "
    "letter or digit",
    pods.QUALIFIED_NAME_PATTERN: "NAME or DOMAIN/NAME",
}
"""What a pattern asks for."""


def listing(words: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def allowed_fields(schema: Schema) -> list[str]:
    """The fields that a person may write, required ones marked."""
    required = schema.get("required", [])
    fields = [name for name, child in schema.get("properties", {}).items() if not child.get("readOnly")]
    return [f"{name} (required)" if name in required else name for name in fields]


def shown(value: object) -> str:
    """What was given, short enough for a message."""
    if isinstance(value, str):
        text = value if len(value) <= 80 else f"{value[:60]}…"
        return json.dumps(text, ensure_ascii=False) + (f" ({len(value)} characters)" if len(value) > 80 else "")
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(list(map(str, value))[:3])}{', …' if len(value) > 3 else ''})" if value else "{}"
    if isinstance(value, list):
        return f"a list of {len(value)} element{'s' if len(value) > 1 else ''}" if value else "an empty list"
    return json.dumps(value, default=str)


def expected(schema: Schema) -> str:
    """What a field takes, in words."""
    match schema:
        case {"enum": choices}:
            return ", ".join(choices)
        case {"pattern": pattern} if pattern in PHRASES:
            return PHRASES[pattern]
        case {"type": "string"}:
            return f"text{bounds(schema, 'minLength', 'maxLength', ' characters')}"
        case {"type": "integer"}:
            return f"a whole number{bounds(schema, 'minimum', 'maximum', '')}"
        case {"type": "number"}:
            return f"a number{number_bounds(schema)}"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "array"}:
            return f"a list{bounds(schema, 'minItems', 'maxItems', ' elements')}"
        case {"type": "object", "properties": _}:
            return f"a mapping with the fields {', '.join(allowed_fields(schema))}"
        case {"x-kubernetes-preserve-unknown-fields": True}:
            return "anything"
        case {"type": "object", "additionalProperties": values}:
            most = schema.get("maxProperties")
            return f"a mapping of text to {expected(values)}{f'; at most {most} of them' if most else ''}"
    return "a mapping" if schema.get("type") == "object" else "another value"


def bounds(schema: Schema, lower: str, upper: str, unit: str) -> str:
    low, high = schema.get(lower), schema.get(upper)
    if low is not None and low == high:
        return f" of {low}{unit}"
    if low is not None and high is not None:
        return f" of {low} to {high}{unit}" if unit else f" from {low} to {high}"
    if high is not None:
        return f" of at most {high}{unit}"
    return f" of at least {low}{unit}" if low is not None else ""


def number_bounds(schema: Schema) -> str:
    words = {
        "exclusiveMinimum": "above {:g}",
        "minimum": "at least {:g}",
        "exclusiveMaximum": "below {:g}",
        "maximum": "at most {:g}",
    }
    parts = [phrase.format(schema[key]) for key, phrase in words.items() if key in schema]
    return f" {listing(parts)}" if parts else ""
