"""Where SFTJobs are tried: a namespace with a bucket, a base model and data, and what becomes of a job there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_api import names
from tests.cluster import jobs
from tests.cluster.bed import RESTRICTED, Cluster
from tests.trainer.runs import make_base

MINUTES = 60.0


@dataclass(frozen=True)
class Lab:
    """A namespace under the restricted Pod Security Standard, with a bucket, a base model and data in it."""

    cluster: Cluster
    namespace: str
    bucket: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return self.cluster.s3.environment

    def start(self, name: str, changes: dict[str, Any] | None = None) -> Job:
        job = Job(self, name, jobs.document(name, self.bucket, changes))
        self.cluster.kubectl("apply", "-n", self.namespace, "-f", "-", input=yaml.safe_dump(job.manifest))
        return job


@dataclass(frozen=True)
class Job:
    """An SFTJob that was applied."""

    lab: Lab
    name: str
    manifest: dict[str, Any]

    @property
    def uri(self) -> str:
        return str(self.manifest["spec"]["checkpoints"]["uri"])

    @property
    def status(self) -> dict[str, Any]:
        found = self.lab.cluster.get("sftjob", self.name, self.lab.namespace)
        status: dict[str, Any] = (found or {}).get("status", {})
        return status

    def condition(self, kind: str) -> dict[str, Any]:
        return next((found for found in self.status.get("conditions", []) if found["type"] == kind), {})

    def wait_for(self, what: str, holds: Callable[[dict[str, Any]], bool], minutes: float = 4) -> None:
        """Until `holds(status)`; a job that has failed meanwhile is an error at once, unless that is awaited."""

        def probe() -> bool:
            status = self.status
            if holds(status):
                return True
            assert status.get("state") != "Failed", json.dumps(status, indent=1)
            return False

        self.lab.cluster.wait_for(f"{self.name}: {what}", probe, minutes * MINUTES)

    def wait_until_succeeded(self, minutes: float = 6) -> None:
        self.wait_for("Succeeded", lambda status: status.get("state") == "Succeeded", minutes)

    def wait_for_commit(self, step: int) -> None:
        """Until the bucket has a complete checkpoint of that step or a later one: sooner seen than any status says."""
        self.wait_for(f"a checkpoint of step {step}", lambda _: any(found >= step for found in self.committed_steps()))

    def committed_steps(self) -> list[int]:
        """Of the complete checkpoints in the bucket, where the S3 server keeps objects as files."""
        folder = self.lab.cluster.s3.folder / self.uri.removeprefix("s3://")
        places = (names.parse_checkpoint(str(path.relative_to(folder))) for path in folder.glob("ckpt/*/*/COMPLETE"))
        return sorted(place[0] for place in places if place)

    def patch(self, spec: dict[str, Any]) -> None:
        change = json.dumps({"spec": spec})
        self.lab.cluster.kubectl("patch", "sft", self.name, "-n", self.lab.namespace, "--type=merge", "-p", change)

    @property
    def digest(self) -> str:
        return str(jobs.last_checkpoint(self.uri, self.lab.environment, self.lab.folder)["parametersDigest"])

    def children(self, selector: str = "") -> list[str]:
        """What the cluster has of the job; `selector` narrows it by labels."""
        kinds = "pytorchjobs,jobs,configmaps,pods,podgroups,services"
        selector = f"sftjob.dev/job={self.name}{selector and ','}{selector}"
        found = self.lab.cluster.kubectl("get", kinds, "-n", self.lab.namespace, "-l", selector, "-o", "name")
        return found.split()


@pytest.fixture(scope="session")
def lab(operator: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    bucket = operator.s3.new_bucket()
    namespace = operator.new_namespace("lab", {"hostpy": "true", **RESTRICTED})
    (folder / "base").mkdir()
    base = make_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in operator.s3.environment.items():
            patch.setenv(name, value)
        jobs.upload(base, f"{bucket}/base")
    operator.kubectl("apply", "-n", namespace, "-f", "-", input=yaml.safe_dump(jobs.secret(operator.s3.environment)))
    return Lab(operator, namespace, bucket, folder)


@pytest.fixture(scope="session")
def undisturbed_digest(lab: Lab) -> str:
    """Of the long job, run on this machine from its first to its last step on two ranks."""
    manifest = jobs.document("undisturbed", lab.bucket, jobs.LONG)
    path = lab.folder / "undisturbed.yaml"
    path.write_text(yaml.safe_dump(manifest))
    jobs.sft("run", str(path), "--processes", "2", environment=lab.environment, cwd=lab.folder)
    uri = manifest["spec"]["checkpoints"]["uri"]
    return str(jobs.last_checkpoint(uri, lab.environment, lab.folder)["parametersDigest"])
