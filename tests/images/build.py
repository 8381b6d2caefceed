"""Builds an image for tests, once for each state of its inputs: scripts/images.sh leaves what is current as it is."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_ENGINE = 77


@cache
def operator_archive() -> Path:
    """The operator's image. Skips the test where nothing can build it; under CI the test fails."""
    built = subprocess.run([ROOT / "scripts/images.sh", "operator"], capture_output=True, text=True, check=False)
    if built.returncode == NO_ENGINE:
        reason = built.stderr.strip().removeprefix("images: LEFT OUT: ")
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    assert built.returncode == 0, built.stderr
    return ROOT / "build/images/operator.tar"
