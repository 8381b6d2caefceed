"""What the README and docs/ say exists, exists: commands, flags, files, fields, and every manifest in them is valid."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from sft_api.job import SFTJob
from sft_api.manifest import parse_job
from sft_api.spec import SFTJobSpec
from sft_cli.__main__ import app
from sft_cli.manifests import read_job

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINER = ROOT / "trainer_image/sft_trainer"
MADE_BY_RUNNING = ("runs/", ".venv", "job.yaml")


def parametrize_documents(name: str = "document") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, DOCUMENTS, ids=lambda path: path.name)


def blocks(document: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(document.read_text()) if language in languages]


def inline(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text()))


def commands(document: Path) -> Iterator[list[str]]:
    """Every command: those of examples, and inline code that begins like one."""
    yield from example_commands(document)
    for code in inline(document):
        yield from command(code)


def example_commands(document: Path) -> Iterator[list[str]]:
    for block in blocks(document, "bash"):
        for line in block.splitlines():
            yield from command(line)


def command(line: str) -> Iterator[list[str]]:
    words = shlex.split(line, comments=True) if "'" not in line else []
    if words and Path(words[0]).name in ("make", "sft", "python"):
        yield [Path(words[0]).name, *(word for word in words[1:] if "…" not in word)]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@parametrize_documents()
def test_every_make_target_exists(document: Path) -> None:
    named = {word for words in commands(document) if words[0] == "make" for word in words[1:] if "=" not in word}
    assert named <= targets()


@parametrize_documents()
def test_sft_has_every_verb_and_flag(document: Path) -> None:
    verbs: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    for words in commands(document):
        if words[0] == "sft" and words[1:] and words[1] != "--help":
            assert words[1] in verbs, words
            flags = {flag for parameter in verbs[words[1]].params for flag in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= flags, words


@parametrize_documents()
def test_sft_takes_every_command_of_an_example(document: Path) -> None:
    verbs: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    for words in example_commands(document):
        if words[0] == "sft":
            verbs[words[1]].make_context(words[1], words[2:])


@parametrize_documents()
def test_every_python_module_exists(document: Path) -> None:
    for module in re.findall(r"python -m ([a-z_.]+[a-z])", document.read_text()):
        assert importlib.util.find_spec(module) is not None, module


@parametrize_documents()
def test_every_pytest_command_selects_tests(document: Path) -> None:
    for words in commands(document):
        if words[:3] == ["python", "-m", "pytest"]:
            files = [ROOT / word for word in words[3:] if word.startswith("tests/")]
            names = [name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]
            wanted = words[words.index("-k") + 1].split(" or ") if "-k" in words else [""]
            assert all(any(part in name for name in names) for part in wanted), words


@parametrize_documents()
def test_every_file_named_exists(document: Path) -> None:
    manifests = [words[2] for words in example_commands(document) if words[0] == "sft"]
    for name in inline(document) + manifests:
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(py|yaml|md|sh|txt))", name)
        if is_path and "/" in name and not name.startswith(MADE_BY_RUNNING):
            if name.split("/")[0] in ("ckpt", "export", "metrics", "data"):  # keys in a store
                continue
            assert any((folder / name).exists() for folder in (ROOT, TRAINER)), name


@parametrize_documents()
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), target


@parametrize_documents()
def test_every_field_named_exists(document: Path) -> None:
    """From the manifest's root (spec.batch.overlong), from its spec (batch.overlong), and before a value too."""
    fields = {field.alias or name for name, field in SFTJobSpec.model_fields.items()}
    for code in inline(document):
        path = re.sub(r"\[\d+\]", "", re.split(r"[=:]", code)[0]).split(".")
        if len(path) > 1 and all(part.isalnum() for part in path) and path[0] in {"spec", *fields}:
            if (TRAINER / code).exists():
                continue
            assert has_field(SFTJob, path) or has_field(SFTJobSpec, path), code


def has_field(model: type[BaseModel], path: list[str]) -> bool:
    """Whether a manifest may have a field at `path`, in its own spelling."""
    if not path:
        return True
    for name, field in model.model_fields.items():
        if path[0] in (name, field.alias):
            return len(path) == 1 or any(has_field(inner, path[1:]) for inner in models_in(field.annotation))
    return False


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from models_in(inner)


@parametrize_documents()
def test_every_manifest_is_valid(document: Path) -> None:
    example = yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())
    for block in blocks(document, "yaml"):
        part = yaml.safe_load(block)
        whole = part if "kind" in part else {**example, "spec": {**example["spec"], **part["spec"]}}
        assert parse_job(whole).spec.phases


@parametrize_documents()
def test_every_override_makes_a_valid_job(document: Path) -> None:
    for words in example_commands(document):
        overrides = [value for flag, value in pairwise(words) if flag == "--set"]
        if words[0] == "sft" and overrides:
            manifest = words[2] if (ROOT / words[2]).exists() else "examples/quickstart.yaml"
            assert read_job(str(ROOT / manifest), overrides).spec.phases


@pytest.mark.parametrize(
    ("document", "example"),
    [("README.md", "examples/quickstart.yaml"), ("docs/first-job.md", "examples/cluster.yaml")],
)
def test_a_document_shows_its_example_as_it_is(document: str, example: str) -> None:
    lines = (ROOT / example).read_text().splitlines(keepends=True)
    assert blocks(ROOT / document, "yaml") == ["".join(line for line in lines if not line.startswith("#"))]


def test_the_readme_leads_to_every_document() -> None:
    linked = set(re.findall(r"\]\(([^)]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {str(path.relative_to(ROOT)) for path in DOCUMENTS[1:]}
