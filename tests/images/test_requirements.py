"""What the images install: pins of constraints.txt with their hashes, and nothing else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.images.build import NO_ENGINE, ROOT

BLOCK = re.compile(r"^(?P<pin>[a-z0-9-]+==[^ ]+).*\n(?P<hashes>(?: +--hash=sha256:[0-9a-f]{64}.*\n?)+)", re.MULTILINE)
REQUIREMENTS = ["operator/requirements.txt", "trainer_image/requirements.txt", "trainer_image/flash-attn.txt"]


def pins(file: Path) -> dict[str, set[str]]:
    """Hashes by pin."""
    return {
        block["pin"]: set(re.findall("sha256:[0-9a-f]{64}", block["hashes"]))
        for block in BLOCK.finditer(file.read_text())
    }


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_has_a_hash_and_none_names_an_index(name: str) -> None:
    text = (ROOT / name).read_text()
    assert len(pins(ROOT / name)) == len(re.findall(r"^\S", text, re.MULTILINE)) > 0
    assert "://" not in text
    assert "--index" not in text


@pytest.mark.parametrize("name", REQUIREMENTS[:2])
def test_an_image_installs_what_the_tests_ran_with(name: str) -> None:
    pinned = pins(ROOT / "constraints.txt")
    differing = {pin for pin, hashes in pins(ROOT / name).items() if pinned.get(pin) != hashes}
    assert not differing, f"{name} and constraints.txt differ in {sorted(differing)}: make constraints"


def test_the_operator_needs_no_training_library() -> None:
    names = {pin.split("==")[0] for pin in pins(ROOT / "operator/requirements.txt")}
    assert {"kopf", "kubernetes", "pydantic"} <= names
    assert not names & {"torch", "numpy", "deepspeed", "transformers", "pyarrow"}


def test_the_trainer_needs_no_kubernetes() -> None:
    names = {pin.split("==")[0] for pin in pins(ROOT / "trainer_image/requirements.txt")}
    assert {"torch", "deepspeed", "obstore"} <= names
    assert not names & {"kopf", "kubernetes"}


def test_without_an_engine_the_script_says_so_in_one_line() -> None:
    script = ROOT / "scripts/images.sh"
    ended = subprocess.run(
        [script], env={"PATH": "/usr/bin:/bin", "HOME": "/", "ENGINE": "none"}, capture_output=True, text=True
    )
    assert ended.returncode == NO_ENGINE
    assert ended.stderr.startswith("images: LEFT OUT: no container engine works here (none)")
    assert ended.stderr.count("\n") == 1
