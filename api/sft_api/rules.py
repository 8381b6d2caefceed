"""The rules across fields. Those of the training are here, those of pods and their scheduling in `pod_rules`."""

from __future__ import annotations

import json

from sft_api.base import ApiModel
from sft_api.pod_rules import POD_RULES
from sft_api.recipes import MAX_SEQUENCE_LENGTH
from sft_api.rule import Given, Rule, Wrongs, count, elements, exactly_one, section
from sft_api.spec import (
    ChatTemplate,
    CheckpointInterval,
    Interval,
    Model,
    SFTJobSpec,
    Trainer,
    Validation,
    Warmup,
)
from sft_api.wording import listing

RESERVED_PHASE_NAMES = ("validation",)
"""Names that mean something else where a phase's name stands, in metrics and events."""


def rules_of(model: type[ApiModel]) -> list[Rule]:
    return [rule for rule in RULES if rule.model is model]


def phases(given: Given) -> list[tuple[str, Given]]:
    """The phases that are mappings, each with its path."""
    found = enumerate(elements(given, "phases"))
    return [(f"phases[{index}]", phase) for index, phase in found if isinstance(phase, dict)]


def revision_is_of_the_hub(given: Given) -> Wrongs:
    uri = given.get("uri")
    if "revision" in given and isinstance(uri, str) and "://" in uri and not uri.startswith("hf://"):
        yield "revision", f"cannot be obeyed: {uri} is not at hf://, and only models there have revisions; remove it"


def built_in_template_is_complete(given: Given) -> Wrongs:
    if "name" not in given:
        return
    for name in ("specialTokens", "endOfTurn"):
        if given.get(name):
            yield (
                name,
                f"cannot be obeyed: the built-in template {given['name']} brings its own; allowed with inline or uri",
            )


def format_is_of_the_uri(given: Given) -> Wrongs:
    if "format" in given and "uri" not in given:
        yield "format", "is allowed only with uri; samples held out by fraction have the format of their phase"


def attention_runs_there(given: Given) -> Wrongs:
    attention = given.get("attention")
    if not isinstance(attention, str) or attention == "SDPA":
        return
    if count(given, "gpusPerNode") == 0:
        yield "attention", f"{attention} needs a GPU, and gpusPerNode is 0; allowed: SDPA, or leave it out"
    if given.get("precision") == "FP32":
        yield "attention", f"{attention} computes in BF16 only, and precision is FP32; allowed: SDPA, or leave it out"


def phase_names_are_unique(given: Given) -> Wrongs:
    seen: dict[str, str] = {}
    for path, phase in phases(given):
        name = phase.get("name")
        if isinstance(name, str) and seen.setdefault(name, path) != path:
            yield (
                f"{path}.name",
                f"{json.dumps(name)} is already the name of spec.{seen[name]}; give each phase its own",
            )


def phase_names_are_free(given: Given) -> Wrongs:
    for path, phase in phases(given):
        if phase.get("name") in RESERVED_PHASE_NAMES:
            yield f"{path}.name", f"{json.dumps(phase['name'])} is reserved for the held-out data; choose another name"


MERGED = {
    "Stacked": "which trains on the data of all phases as one",
    "ByLength": "which trains on the data of all phases by length",
}


def only_phased_phases_override(given: Given) -> Wrongs:
    strategy = given.get("strategy", "Stacked")
    merged = MERGED.get(strategy) if isinstance(strategy, str) else None
    if merged is None:
        return
    default = "" if "strategy" in given else " (the default)"
    for path, phase in phases(given):
        for name in ("epochs", "batch", "optimizer"):
            if name in phase:
                yield (
                    f"{path}.{name}",
                    f"cannot be obeyed under strategy {strategy}{default}, {merged}; "
                    f"set spec.{name} instead, or spec.strategy: Phased",
                )


def no_recipe_needs(*path: str) -> Rule:
    """Without a recipe nobody else says it: the job does, or every one of its phases."""
    *parents, name = path

    def check(given: Given) -> Wrongs:
        elements = [phase for _, phase in phases(given)]
        in_phases = bool(elements) and all(name in section(phase, *parents) for phase in elements)
        if given.get("recipe") == "none" and name not in section(given, *parents) and not in_phases:
            yield ".".join(path), "is required with recipe none, which fills in nothing"

    def has(owner: str) -> str:
        return " && ".join(f"has({owner}.{'.'.join(path[: depth + 1])})" for depth in range(len(path)))

    dotted = ".".join(path)
    cel = f"self.recipe != 'none' || ({has('self')}) || self.phases.all(p, {has('p')})"
    return Rule(SFTJobSpec, cel, f"recipe none needs {dotted}", check)


def best_needs_validation(given: Given) -> Wrongs:
    best = count(section(given, "checkpoints", "keep"), "best")
    if best and "validation" not in given:
        yield (
            "checkpoints.keep.best",
            f"{best} needs spec.validation, whose loss ranks the checkpoints; add it, or set best: 0",
        )


FIT = "a sample has to fit into one micro-batch; raise maxTokensPerGPU or lower maxSequenceLength"


def a_sample_fits(given: Given) -> Wrongs:
    batch = section(given, "batch")
    capacity, length = count(batch, "maxTokensPerGPU"), count(batch, "maxSequenceLength")
    longest = f"maxSequenceLength, {length or f'{MAX_SEQUENCE_LENGTH} by default'}"
    if capacity is not None and capacity < (length or MAX_SEQUENCE_LENGTH):
        yield "batch.maxTokensPerGPU", f"{capacity} is less than {longest}: {FIT}"


def a_sample_fits_in_every_phase(given: Given) -> Wrongs:
    batch = section(given, "batch")
    for path, phase in phases(given):
        own = section(phase, "batch")
        capacity = count(own, "maxTokensPerGPU") or count(batch, "maxTokensPerGPU")
        length = count(own, "maxSequenceLength") or count(batch, "maxSequenceLength") or MAX_SEQUENCE_LENGTH
        if capacity is None or capacity >= length:
            continue
        if "maxTokensPerGPU" in own:
            yield f"{path}.batch.maxTokensPerGPU", f"{capacity} is less than maxSequenceLength, here {length}: {FIT}"
        elif "maxSequenceLength" in own:
            yield f"{path}.batch.maxSequenceLength", f"{length} is more than maxTokensPerGPU, {capacity}: {FIT}"


SAMPLE_FITS = (
    "!has(self.batch.maxTokensPerGPU) || self.batch.maxTokensPerGPU >= "
    f"(has(self.batch.maxSequenceLength) ? self.batch.maxSequenceLength : {MAX_SEQUENCE_LENGTH})"
)
SAMPLE_FITS_IN_EVERY_PHASE = (
    "self.phases.all(p, !has(p.batch) || !(has(p.batch.maxTokensPerGPU) || has(p.batch.maxSequenceLength)) "
    "|| !(has(p.batch.maxTokensPerGPU) || has(self.batch.maxTokensPerGPU)) "
    "|| (has(p.batch.maxTokensPerGPU) ? p.batch.maxTokensPerGPU : self.batch.maxTokensPerGPU) >= "
    "(has(p.batch.maxSequenceLength) ? p.batch.maxSequenceLength "
    f": has(self.batch.maxSequenceLength) ? self.batch.maxSequenceLength : {MAX_SEQUENCE_LENGTH}))"
)

RULES: list[Rule] = [
    Rule(
        Model,
        "!has(self.revision) || self.uri.startsWith('hf://')",
        "revision is allowed only with an hf:// model",
        revision_is_of_the_hub,
    ),
    exactly_one(ChatTemplate, "name", "inline", "uri"),
    Rule(
        ChatTemplate,
        "!has(self.name) || (self.specialTokens.size() == 0 && !has(self.endOfTurn))",
        "specialTokens and endOfTurn are allowed only with inline or uri",
        built_in_template_is_complete,
    ),
    exactly_one(Validation, "fraction", "uri"),
    Rule(
        Validation,
        "!has(self.format) || has(self.uri)",
        "format is allowed only with uri",
        format_is_of_the_uri,
    ),
    exactly_one(Warmup, "steps", "ratio"),
    exactly_one(Interval, "steps", "samples"),
    exactly_one(CheckpointInterval, "steps", "samples", "minutes"),
    Rule(
        Trainer,
        "!has(self.attention) || self.attention == 'SDPA' || (self.gpusPerNode > 0 && self.precision != 'FP32')",
        "only SDPA attention computes on the CPU (gpusPerNode 0) or in FP32",
        attention_runs_there,
    ),
    Rule(
        SFTJobSpec,
        "self.phases.all(p, self.phases.exists_one(q, q.name == p.name))",
        "phase names must be unique",
        phase_names_are_unique,
    ),
    Rule(
        SFTJobSpec,
        f"self.phases.all(p, !(p.name in [{', '.join(repr(name) for name in RESERVED_PHASE_NAMES)}]))",
        f"phase name {listing(RESERVED_PHASE_NAMES)} is reserved",
        phase_names_are_free,
    ),
    Rule(
        SFTJobSpec,
        "self.strategy == 'Phased' || self.phases.all(p, !has(p.epochs) && !has(p.batch) && !has(p.optimizer))",
        "phases may override epochs, batch and optimizer only under strategy Phased",
        only_phased_phases_override,
    ),
    no_recipe_needs("epochs"),
    no_recipe_needs("batch", "effectiveBatchSize"),
    no_recipe_needs("optimizer", "learningRate"),
    Rule(
        SFTJobSpec,
        "self.checkpoints.keep.best == 0 || has(self.validation)",
        "checkpoints.keep.best needs validation",
        best_needs_validation,
    ),
    Rule(SFTJobSpec, SAMPLE_FITS, "batch.maxTokensPerGPU must be at least maxSequenceLength", a_sample_fits),
    Rule(
        SFTJobSpec,
        SAMPLE_FITS_IN_EVERY_PHASE,
        "in every phase, maxTokensPerGPU must be at least maxSequenceLength",
        a_sample_fits_in_every_phase,
    ),
    *POD_RULES,
]
