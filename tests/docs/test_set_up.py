"""What a fresh machine relies on: pins that fit and cover everything, scripts that parse, a Makefile that tells."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?: ; (?P<marker>.*?))? \\$", re.MULTILINE)
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[str]:
    project = PROJECT["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    return [*project["dependencies"], *extras, *PROJECT["build-system"]["requires"]]


@pytest.mark.parametrize("text", requirements())
def test_a_requirement_has_a_pin_that_satisfies_it(text: str) -> None:
    requirement = Requirement(text)
    pins = [match["version"] for match in PIN.finditer(CONSTRAINTS) if match["name"] == requirement.name.lower()]
    assert pins, f"{text} is not in constraints.txt: make constraints"
    assert all(requirement.specifier.contains(pin) for pin in pins), f"{text} is pinned to {pins}: make constraints"


def test_every_pin_has_a_hash_and_none_names_an_index() -> None:
    lines = CONSTRAINTS.splitlines()
    pins = [index for index, line in enumerate(lines) if not line.startswith(" ")]
    assert len(pins) == len(PIN.findall(CONSTRAINTS))
    assert all(lines[index + 1].startswith("    --hash=sha256:") for index in pins)
    assert "://" not in CONSTRAINTS
    assert "--index" not in CONSTRAINTS


def test_make_help_tells_of_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    told = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(re.findall(r"^make ([a-z-]+) ", told.stdout, re.MULTILINE)) == phony


@pytest.mark.parametrize("script", sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]), ids=lambda path: path.name)
def test_a_script_stops_at_the_first_error(script: Path) -> None:
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


def test_ci_runs_what_the_readme_says() -> None:
    run = re.findall(r"^make (\w+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert run == ["check", "test"]
    assert all(f"make {target}" in (ROOT / "README.md").read_text() for target in run)
