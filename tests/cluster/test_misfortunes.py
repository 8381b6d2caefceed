"""What happens to a cluster rather than to a job: a lost node, a training operator that cannot start workers."""

from __future__ import annotations

from typing import Any

from tests.cluster import jobs
from tests.cluster.lab import MINUTES, Lab


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((found for found in status.get("conditions", []) if found["type"] == kind), {})


def test_a_lost_node_costs_a_disruption_and_no_restart(lab: Lab, undisturbed_digest: str) -> None:
    job = lab.start("lost-node", jobs.LONG | {"scheduling": {"gang": "None"}})
    job.wait_for_commit(10)
    lost = next(
        pod["spec"]["nodeName"]
        for pod in lab.cluster.list("Pod", lab.namespace, f"sftjob.dev/job={job.name}")
        if pod["metadata"]["name"].endswith("-worker-0")
    )
    lab.cluster.kill_node(lost)
    try:
        job.wait_for("a second attempt", lambda status: len(status.get("attempts", [])) == 2, minutes=5)
        first = job.status["attempts"][0]
        assert (first["reason"], first["disruption"]) == ("Disrupted", True)
        assert f"on node {lost}" in first["message"]
        job.wait_until_succeeded()
    finally:
        lab.cluster.start_node(lost)
    assert (job.status["restarts"], job.status["disruptions"]) == (0, 1)
    assert job.digest == undisturbed_digest


def test_workers_that_pod_security_refuses_are_named_with_the_cure(lab: Lab) -> None:
    lab.cluster.let_training_operator_start_restricted_workers(False)
    try:
        job = lab.start("refused")

        def is_named(status: dict[str, Any]) -> bool:
            running = condition(status, "Running")
            return running.get("reason") == "PodSecurity" and "initContainer.yaml" in running["message"]

        job.wait_for("it says what is refused", is_named)
        assert job.status["state"] == "Queued"
    finally:
        lab.cluster.let_training_operator_start_restricted_workers(True)
    lab.cluster.kubectl("delete", "sft", job.name, "-n", lab.namespace)
    lab.cluster.wait_for("its pods are gone", lambda: not job.children(), 2 * MINUTES)
