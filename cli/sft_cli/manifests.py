"""From files to jobs: reads YAML as Kubernetes does, applies `--set`, and names every problem with its place."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft_api.job import SFTJob
from sft_api.manifest import ManifestError, parse_job
from sft_cli.overrides import BadOverride, apply_override

GROUP = "sftjob.dev/"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a file."""

    file: str
    message: str
    path: str | None = None
    """The field, as `spec.phases[1].data[0].uri`; none where the file as a whole is meant."""

    def __str__(self) -> str:
        parts = [self.file, self.path, " ".join(self.message.split())]
        return ": ".join(part for part in parts if part)


class BadManifest(Exception):
    """A file that does not hold what was asked of it."""

    def __init__(self, findings: Sequence[Finding]):
        super().__init__("\n".join(str(finding) for finding in findings))
        self.findings = list(findings)


@dataclass
class Reading:
    """What a file held: jobs, what is wrong, and the objects of other kinds that were passed over."""

    jobs: list[SFTJob] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


class ManifestLoader(yaml.SafeLoader):
    """YAML as the API server reads it: 2e-5 is a number, a date is text, and a key stands once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key_node.value in seen:
                first = seen[key_node.value].line + 1
                message = f"the key {key_node.value!r} stands here for the second time; the first is on line {first}"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen[key_node.value] = key_node.start_mark
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: str) -> None:
    ManifestLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)$", "-+0123456789")
_resolve("float", r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789.")
_resolve("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.")
_resolve("merge", r"^<<$", "<")
ManifestLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)


def read_text(file: str) -> str:
    """The text of `file`, or of standard input where it is `-`. Raises BadManifest."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise BadManifest([Finding(file, f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise BadManifest([Finding(file, f"is not UTF-8 text (byte {error.start})")]) from error


def read_documents(file: str) -> list[object]:
    """The YAML documents of `file` that are not empty. Raises BadManifest with line and column."""
    try:
        documents = list(yaml.load_all(read_text(file), ManifestLoader))
    except yaml.MarkedYAMLError as error:
        raise BadManifest([Finding(file, syntax_message(error))]) from error
    except yaml.YAMLError as error:
        raise BadManifest([Finding(file, f"is not YAML: {error}")]) from error
    except (ValueError, RecursionError) as error:
        raise BadManifest([Finding(file, f"is not YAML that can be read: {error}")]) from error
    return [document for document in documents if document is not None]


def syntax_message(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    context = f" ({error.context})" if error.context else ""
    return f"{place}{error.problem}{context}"


def read_jobs(file: str) -> Reading:
    """Every SFTJob in `file`. An object of another kind is passed over if an SFTJob stands beside it."""
    reading = Reading()
    try:
        documents = read_documents(file)
    except BadManifest as error:
        reading.findings.extend(error.findings)
        return reading
    ours = [document for document in documents if not is_foreign(document)]
    if not ours:
        found = ", ".join(described(document) for document in documents) or "nothing"
        reading.findings.append(Finding(file, f"holds no SFTJob ({found} found); it needs one with kind: SFTJob"))
        return reading
    for number, document in enumerate(documents, start=1):
        if is_foreign(document):
            reading.passed_over.append(described(document))
            continue
        try:
            reading.jobs.append(parse_job(document))
        except ManifestError as error:
            suffix = f" (document {number})" if len(documents) > 1 else ""
            reading.findings.extend(findings_of(file, error, suffix))
    return reading


def read_job(file: str, overrides: Sequence[str] = ()) -> SFTJob:
    """The one SFTJob that `file` holds, with `--set` applied. Raises BadManifest with every problem."""
    documents = read_documents(file)
    if len(documents) != 1:
        found = "nothing" if not documents else f"{len(documents)} documents"
        raise BadManifest([Finding(file, f"holds {found}; this command takes a file with one SFTJob")])
    document = documents[0]
    if is_foreign(document):
        raise BadManifest([Finding(file, f"holds no SFTJob ({described(document)} found)")])
    try:
        for override in overrides:
            document = apply_override(document, override, ManifestLoader)
    except BadOverride as error:
        raise BadManifest([Finding("--set", str(error))]) from error
    try:
        return parse_job(document)
    except ManifestError as error:
        raise BadManifest(findings_of(file, error)) from error


def findings_of(file: str, error: ManifestError, suffix: str = "") -> list[Finding]:
    return [Finding(file, problem.message + suffix, problem.path or None) for problem in error.problems]


def is_foreign(document: object) -> bool:
    """Whether this is an object of Kubernetes, or of another operator, that is plainly not meant as an SFTJob."""
    if not isinstance(document, dict):
        return False
    version, kind = document.get("apiVersion"), document.get("kind")
    named = isinstance(version, str) and isinstance(kind, str)
    return named and not str(version).startswith(GROUP) and str(kind).lower() != "sftjob"


def described(document: object) -> str:
    if isinstance(document, dict) and "kind" in document:
        metadata = document.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        return f"{document['kind']} {name}" if name else str(document["kind"])
    return type(document).__name__
