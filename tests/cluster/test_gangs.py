"""Two gangs that together want more than there is: with gang scheduling one after the other, without it a deadlock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.lab import MINUTES, Job, Lab

SLOT = "example.com~1slot"
GATE = "tests.sftjob.dev/hold"
"""Holds every pod until the test lets it go, so that the order in which pods come to the scheduler is the test's."""


@pytest.fixture(scope="module")
def slots(lab: Lab) -> Iterator[Lab]:
    """Eight of something on each of the two nodes."""
    for node in lab.cluster.nodes:
        change = [{"op": "add", "path": f"/status/{kind}/{SLOT}", "value": "8"} for kind in ("capacity", "allocatable")]
        lab.cluster.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", json.dumps(change))
    yield lab
    for node in lab.cluster.nodes:
        change = [{"op": "remove", "path": f"/status/{kind}/{SLOT}"} for kind in ("capacity", "allocatable")]
        lab.cluster.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", json.dumps(change))


def start_held(lab: Lab, name: str, gang: str) -> Job:
    """A job whose pods want five of eight on a node each, prepared, its gang's pods held back."""
    job = lab.start(
        name,
        {
            "scheduling": {"gang": gang},
            "trainer": {
                "resources": {"limits": {"example.com/slot": "5"}},
                "podTemplate": {"spec": {"schedulingGates": [{"name": GATE}]}},
            },
        },
    )
    let_go(lab, lab.cluster.wait_for(f"{name} prepares", lambda: pods(job, role="prepare") or None, MINUTES)[0])
    lab.cluster.wait_for(f"the pods of {name}", lambda: len(pods(job)) == 2, 2 * MINUTES)
    return job


def pods(job: Job, role: str = "train") -> list[dict[str, Any]]:
    """The job's pods of that role, the master first."""
    selector = f"sftjob.dev/job={job.name},sftjob.dev/role={role}"
    found = job.lab.cluster.kubectl("get", "pods", "-n", job.lab.namespace, "-l", selector, "-o", "json")
    listed: list[dict[str, Any]] = json.loads(found)["items"]
    return sorted(listed, key=lambda pod: pod["metadata"]["name"])


def let_go(lab: Lab, pod: dict[str, Any]) -> None:
    change = json.dumps([{"op": "remove", "path": "/spec/schedulingGates"}])
    lab.cluster.kubectl("patch", "pod", pod["metadata"]["name"], "-n", lab.namespace, "--type=json", "-p", change)


def placed(job: Job) -> list[str]:
    return [pod["spec"]["nodeName"] for pod in pods(job) if "nodeName" in pod["spec"]]


def unschedulable(job: Job) -> list[str]:
    """Pods that the scheduler has looked at and found no node for."""
    return [
        pod["metadata"]["name"]
        for pod in pods(job)
        for condition in pod.get("status", {}).get("conditions", [])
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable"
    ]


def test_without_a_gang_two_jobs_hold_half_of_what_each_needs(slots: Lab) -> None:
    first, second = (start_held(slots, name, "None") for name in ("half-a", "half-b"))
    for job in (first, second):
        let_go(slots, pods(job)[0])
        slots.cluster.wait_for(f"the master of {job.name} is placed", lambda job=job: len(placed(job)) == 1, MINUTES)
    for job in (first, second):
        let_go(slots, pods(job)[1])
    for job in (first, second):
        slots.cluster.wait_for(f"the worker of {job.name} waits", lambda job=job: len(unschedulable(job)) == 1, MINUTES)
        assert len(placed(job)) == 1
        job.wait_for(
            "it says so",
            lambda status: any(
                found["type"] == "GangScheduled"
                and found["status"] == "False"
                and found["message"].startswith("1 of 2 pods placed")
                and "Insufficient example.com/slot" in found["message"]
                for found in status["conditions"]
            ),
        )
    for job in (first, second):
        slots.cluster.kubectl("delete", "sft", job.name, "-n", slots.namespace)
        slots.cluster.wait_for("its pods are gone", lambda job=job: not pods(job), 2 * MINUTES)


def test_as_gangs_the_same_two_jobs_run_one_after_the_other(slots: Lab) -> None:
    first, second = (start_held(slots, name, "Native") for name in ("whole-a", "whole-b"))
    for index in (0, 1):
        for job in (first, second):
            let_go(slots, pods(job)[index])
    running: list[Job] = []

    def one_is_placed() -> bool:
        counts = {job.name: len(placed(job)) for job in (first, second)}
        assert sorted(counts.values()) in ([0, 0], [0, 1], [0, 2]), counts  # half of one gang, while it is being bound
        running[:] = [job for job in (first, second) if counts[job.name] == 2]
        return bool(running)

    slots.cluster.wait_for("a gang is placed", one_is_placed, MINUTES)
    [winner] = running
    waiting = second if winner is first else first
    assert sorted(placed(winner)) == sorted(slots.cluster.nodes)
    assert placed(waiting) == []
    winner.wait_for("it says so", lambda status: condition(status, "GangScheduled") == ("True", "Native"))
    winner.wait_until_succeeded()
    waiting.wait_until_succeeded()
    ended = winner.status["attempts"][0]["ended"]
    assert waiting.status["attempts"][0]["running"] >= ended


def condition(status: dict[str, Any], kind: str) -> tuple[str, str]:
    found = next((found for found in status.get("conditions", []) if found["type"] == kind), {})
    return found.get("status", ""), found.get("reason", "")
