"""The operator in the test cluster: its real image, installed by Helm as a user installs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.bed import RESTRICTED, Cluster
from tests.cluster.images import TRAINER

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "sftjob-operator"
IMAGE = ROOT / "build" / "images" / "operator.tar"
NO_ENGINE = 77
"""How scripts/images.sh ends where there is nothing to build with."""


def operator_image() -> Path:
    """The image as an archive, built unless its inputs are unchanged."""
    built = subprocess.run([ROOT / "scripts/images.sh", "operator"], cwd=ROOT, capture_output=True, text=True)
    if built.returncode == NO_ENGINE:
        reason = built.stderr.strip().splitlines()[-1]
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    assert built.returncode == 0, built.stdout + built.stderr
    return IMAGE


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Cluster:
    """The cluster with the operator at work in it, for all namespaces."""
    cluster.import_image(operator_image())
    namespace = cluster.new_namespace("sft-system", RESTRICTED)
    values = {"trainer.image": TRAINER}
    settings = [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]
    cluster.helm("install", "sft", str(CHART), "-n", namespace, *settings, "--wait", "--timeout", "120s")
    return cluster
