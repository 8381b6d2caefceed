"""The quickstart as a team takes it to its cluster: `kubectl apply`, two pods on two nodes, a model in the bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_trainer.store import Store
from tests.cluster import jobs
from tests.cluster.images import ROOT
from tests.cluster.lab import MINUTES, Job, Lab

NAME = "quickstart"


def example(module: str, folder: Path, *arguments: str) -> str:
    """What a module of examples/quickstart prints, run in `folder`."""
    path = os.pathsep.join(str(ROOT / root) for root in ("", "api", "trainer_image"))
    done = subprocess.run(
        [sys.executable, "-m", f"examples.quickstart.{module}", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def manifest(lab: Lab, out: str) -> dict[str, Any]:
    """examples/quickstart.yaml with its places in the bucket, on two pods."""
    text = (ROOT / "examples/quickstart.yaml").read_text()
    whole: dict[str, Any] = yaml.safe_load(text.replace("file://runs/quickstart", f"{lab.bucket}/quickstart"))
    whole["spec"]["trainer"]["nodes"] = 2
    whole["spec"]["checkpoints"] |= {
        "uri": f"{lab.bucket}/{out}",
        "credentials": {"secretRef": {"name": jobs.SECRET}},
    }
    return whole


@pytest.fixture(scope="module")
def folder(lab: Lab) -> Path:
    """Where the quickstart's data and model were made; they are in the bucket too."""
    folder = lab.folder / NAME
    folder.mkdir()
    example("teach", folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in lab.environment.items():
            patch.setenv(name, value)
        jobs.upload(folder / "runs" / NAME, f"{lab.bucket}/{NAME}")
    return folder


@pytest.fixture(scope="module")
def job(lab: Lab, folder: Path) -> Job:
    """The quickstart, applied and succeeded; where its pods ran stands in `places.json`."""
    job = Job(lab, NAME, manifest(lab, "out/cluster"))
    lab.cluster.kubectl("apply", "-n", lab.namespace, "-f", "-", input=yaml.safe_dump(job.manifest))
    job.wait_for("Running", lambda status: status.get("state") == "Running")
    pods = lab.cluster.list("Pod", lab.namespace, f"sftjob.dev/job={NAME},sftjob.dev/role=train")
    places = {
        pod["metadata"]["name"]: [pod["spec"].get("nodeName"), pod["spec"].get("schedulingGroup")] for pod in pods
    }
    (folder / "places.json").write_text(json.dumps(places))
    timeout = f"--timeout={10 * MINUTES:.0f}s"
    lab.cluster.kubectl("wait", f"sft/{NAME}", "-n", lab.namespace, "--for=condition=Succeeded", timeout)
    return job


def test_its_two_pods_were_placed_as_one_gang_on_two_nodes(job: Job, folder: Path) -> None:
    places = json.loads((folder / "places.json").read_text())
    assert sorted(places) == [f"{NAME}-1-master-0", f"{NAME}-1-worker-0"]
    nodes, groups = zip(*places.values(), strict=True)
    assert set(nodes) == set(job.lab.cluster.nodes)
    assert groups == ({"podGroupName": f"{NAME}-1"},) * 2
    scheduled = job.condition("GangScheduled")
    assert scheduled["reason"] == "NoPods"  # they have ended
    assert job.condition("Prepared")["status"] == "True"


def test_its_status_says_what_a_person_on_call_wants_to_know(job: Job) -> None:
    status = job.status
    total = status["progress"]["totalSteps"]
    assert status["state"] == "Succeeded"
    assert status["observedGeneration"] == 1
    assert status["progress"]["step"] == total == sum(phase["steps"] for phase in status["plan"]["phases"])
    assert status["progress"]["percent"] == 100
    assert (status["checkpoint"]["step"], status["checkpoint"]["verified"]) == (total, True)
    assert status["export"]["uri"] == f"{job.uri}/export/sorting"
    assert (status["restarts"], status["disruptions"]) == (0, 0)
    assert 0 < status["goodput"] <= 1
    [attempt] = status["attempts"]
    assert (attempt["name"], attempt["reason"]) == (f"{NAME}-1", "Completed")
    assert {condition["observedGeneration"] for condition in status["conditions"]} == {1}


def test_kubectl_tells_it_in_words(job: Job) -> None:
    cluster, namespace = job.lab.cluster, job.lab.namespace
    header, row = cluster.kubectl("get", "sft", NAME, "-n", namespace).splitlines()
    assert header.split() == [
        "NAME", "STATE", "PHASE", "STEP", "PROGRESS", "LOSS", "RESTARTS", "CHECKPOINT", "REASON", "AGE",
    ]  # fmt: skip
    assert row.split()[:4] == [NAME, "Succeeded", "sorting", str(job.status["progress"]["step"])]
    described = cluster.kubectl("describe", "sft", NAME, "-n", namespace)
    for reason in ("Prepared", "GangRunning", "Succeeded"):
        assert f" {reason} " in described.partition("Events:")[2], described
    assert "effectiveBatchSize" in cluster.kubectl("explain", "sft.spec.batch")


def test_the_exported_model_loads_and_answers(job: Job, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in job.lab.environment.items():
            patch.setenv(name, value)
        store = Store.open(f"{job.uri}/export")
        for info in store.list():
            store.download(info.key, folder / "runs" / NAME / "out/export" / info.key)
    scores = json.loads(example("score", folder, "-o", "json"))
    accuracy = {(score["model"], score["skill"]): score["accuracy"] for score in scores}
    assert accuracy["before", "pairs"] == accuracy["before", "sorting"] == 0
    assert accuracy["after sorting", "pairs"] > 0.8
    assert accuracy["after sorting", "sorting"] > 0.8


def test_sft_run_on_one_machine_ends_with_the_same_parameters(job: Job, folder: Path) -> None:
    path = folder / "laptop.yaml"
    laptop = manifest(job.lab, "out/laptop")
    path.write_text(yaml.safe_dump(laptop))
    jobs.sft("run", str(path), "--processes", "2", environment=job.lab.environment, cwd=folder)
    uri = laptop["spec"]["checkpoints"]["uri"]
    assert jobs.last_checkpoint(uri, job.lab.environment, folder)["parametersDigest"] == job.digest
