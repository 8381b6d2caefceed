"""SFTJobs on a real Kubernetes, by the operator from its image: trained, killed, suspended, deleted, refused."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from tests.cluster import jobs
from tests.cluster.lab import MINUTES, Job, Lab


def test_a_killed_rank_costs_a_restart_and_the_parameters_are_the_same(lab: Lab, undisturbed_digest: str) -> None:
    job = lab.start("killed", jobs.LONG)
    job.wait_for_commit(10)
    os.kill(a_rank_of(job, "worker"), signal.SIGKILL)
    job.wait_for("a second attempt", lambda status: len(status.get("attempts", [])) == 2)
    first, second = job.status["attempts"]
    assert first["reason"] == "Killed"
    assert "was killed by SIGKILL" in first["message"]
    assert first["name"] == "killed-1"
    job.wait_until_succeeded()
    assert job.status["attempts"][-1]["resumedFromStep"] >= 10
    assert second["name"] == "killed-2"
    assert job.digest == undisturbed_digest


def a_rank_of(job: Job, replica: str) -> int:
    """Process id, on this machine, of a training rank in the job's pod of that replica type."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended meanwhile
        if b"sft_trainer\0rank" in command and any(
            re.fullmatch(rf"HOSTNAME={job.name}-\d+-{replica}-\d+", variable) for variable in environment
        ):
            return int(folder.name)
    raise AssertionError(f"no rank of {job.name} runs")


def test_a_permanent_failure_fails_at_once_with_its_reason_in_kubectl_get(lab: Lab) -> None:
    job = lab.start("no-gpu", {"trainer": {"gpusPerNode": 1}})
    job.wait_for("Failed", lambda status: status.get("state") == "Failed")
    status = job.status
    assert len(status["attempts"]) == 1
    assert status["attempts"][0]["reason"] == "Configuration"
    assert "spec.trainer.gpusPerNode" in job.condition("Succeeded")["message"]
    assert job.condition("Stalled")["status"] == "True"
    row = lab.cluster.kubectl("get", "sft", job.name, "-n", lab.namespace)
    assert "Failed" in row
    assert "Configuration" in row


def test_suspended_in_the_middle_and_resumed_it_ends_with_the_same_parameters(
    lab: Lab, undisturbed_digest: str
) -> None:
    job = lab.start("suspended", jobs.LONG)
    job.wait_for_commit(10)
    job.patch({"suspend": True})
    job.wait_for("Suspended", lambda status: status.get("state") == "Suspended")
    assert job.children("sftjob.dev/role=train") == []
    stopped_at = job.status["checkpoint"]["step"]
    assert stopped_at >= 10
    job.patch({"suspend": False})
    job.wait_until_succeeded()
    assert job.status["attempts"][-1]["resumedFromStep"] == stopped_at
    assert (job.status["restarts"], job.status["disruptions"]) == (0, 0)
    assert job.digest == undisturbed_digest


def test_a_job_deleted_in_the_middle_leaves_nothing_but_the_bucket(lab: Lab) -> None:
    job = lab.start("deleted", jobs.LONG)
    job.wait_for_commit(10)
    assert job.children("sftjob.dev/role=train")
    lab.cluster.kubectl("delete", "sft", job.name, "-n", lab.namespace)
    lab.cluster.wait_for("no child is left", lambda: not job.children(), 2 * MINUTES)
