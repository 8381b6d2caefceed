"""Renders the chart as `helm install` would, without a cluster.

`tests/tools/build_tools.sh` builds Helm. Where it is missing these tests skip, and under CI they fail.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/sftjob-operator"
KUBERNETES = "1.37.2"
POLICIES = "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"
"""What an API server serves from Kubernetes 1.36 on, as Helm spells it."""

Manifest = dict[str, Any]


def program() -> Path:
    """Helm. Skips the test where it is not there."""
    cache = Path(os.environ.get("SFTJOB_CACHE") or Path.home() / ".cache" / "sftjob")
    helm = cache / "bin" / "helm"
    if not helm.exists():
        reason = f"there is no Helm at {helm}: tests/tools/build_tools.sh builds it"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return helm


def helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    given = ["--values", "-"] if values is not None else []
    return subprocess.run(
        [program(), *arguments, *given], input=json.dumps(values or {}), capture_output=True, text=True, check=False
    )


class Rendered:
    """The manifests of a release, in the order of the templates."""

    def __init__(self, text: str):
        self.text = text
        self.manifests: list[Manifest] = [manifest for manifest in yaml.safe_load_all(text) if manifest]

    def all(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Manifest:
        [found] = [manifest for manifest in self.all(kind) if name in (None, manifest["metadata"]["name"])]
        return found

    @property
    def pod(self) -> Manifest:
        spec: Manifest = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    @property
    def environment(self) -> dict[str, Any]:
        """What the operator is told; where another object tells it, the field that says so."""
        [container] = self.pod["containers"]
        return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def template(values: dict[str, Any] | None = None, *, served: tuple[str, ...] = (POLICIES,)) -> Rendered:
    """The chart as release `sft` in namespace `sftjob-system`, on an API server that also serves `served`."""
    ended = helm(*command(served), values=values or {})
    assert ended.returncode == 0, ended.stderr
    return Rendered(ended.stdout)


def refusal(values: dict[str, Any]) -> str:
    """What Helm says to values that it does not take."""
    ended = helm(*command(()), values=values)
    assert ended.returncode != 0, "these values were taken"
    return ended.stderr


def command(served: tuple[str, ...]) -> list[str]:
    also = [word for version in served for word in ("--api-versions", version)]
    where = ["--namespace", "sftjob-system", "--kube-version", KUBERNETES]
    return ["template", "sft", str(CHART), *where, *also]
