"""What is made of the objects that an API server, a kubelet and the training operator show."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from sft_api import labels
from sft_api.status import State
from sft_operator.observed import Ended, Gang, Pod, PodGroup, PrepareJob, Role, Trouble
from sft_operator.views import child, job_key, job_status, troubles
from tests.operator import raw
from tests.operator.raw import condition, container

MADE = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
LATER = datetime(2026, 11, 24, 12, 0, 30, tzinfo=UTC)


def pod_of(given: raw.Raw) -> Pod:
    found = child("Pod", given)
    assert found is not None
    assert isinstance(found.projection, Pod)
    return found.projection


def gang_of(given: raw.Raw) -> Gang:
    found = child("PyTorchJob", given)
    assert found is not None
    assert isinstance(found.projection, Gang)
    return found.projection


def test_a_new_pod_is_pending_on_no_node() -> None:
    assert pod_of(raw.pod(rank=2)) == Pod(
        name="lab-1-worker-1",
        uid="uid-of-lab-1-worker-1",
        role=Role.TRAIN,
        attempt=1,
        rank=2,
        phase="Pending",
        created=MADE,
        owner=raw.UID,
    )


def test_a_running_pod_has_its_node_its_address_and_when_it_was_placed() -> None:
    pod = pod_of(raw.running())
    assert (pod.rank, pod.phase, pod.node, pod.ip, pod.scheduled) == (0, "Running", "node-1", "10.0.0.1", LATER)
    assert pod.is_running


def test_a_pod_without_a_node_says_why_in_the_schedulers_words() -> None:
    refusal = condition(
        "PodScheduled", "False", "Unschedulable", "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    )
    pod = pod_of(raw.pod(status={"conditions": [refusal]}))
    assert pod.unscheduled == "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    assert pod.scheduled is None


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"containerStatuses": [container({"waiting": {"reason": "ContainerCreating"}})]}, None),
        (
            {
                "containerStatuses": [
                    container({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling x"}})
                ]
            },
            "ImagePullBackOff: Back-off pulling x",
        ),
        (
            {"containerStatuses": [container({"waiting": {"reason": "InvalidImageName"}})]},
            "InvalidImageName",
        ),
        (
            {
                "initContainerStatuses": [
                    container({"waiting": {"reason": "ErrImagePull", "message": "no"}}, "init-pytorch")
                ],
                "containerStatuses": [container({"waiting": {"reason": "PodInitializing"}})],
            },
            "ErrImagePull: no",
        ),
        (
            {
                "initContainerStatuses": [container({"running": {}}, "init-pytorch")],
                "containerStatuses": [container({"waiting": {"reason": "PodInitializing"}})],
            },
            None,
        ),
        (
            {
                "containerStatuses": [
                    container({"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "b" not found'}})
                ]
            },
            'CreateContainerConfigError: secret "b" not found',
        ),
    ],
    ids=["starting", "image missing", "image misnamed", "init image missing", "init runs", "secret missing"],
)
def test_what_a_pod_waits_for_is_said_unless_every_pod_waits_for_it(statuses: raw.Raw, expected: str | None) -> None:
    assert pod_of(raw.pod(status=statuses)).waiting == expected


def test_a_pod_that_ended_tells_code_reason_message_and_time() -> None:
    pod = pod_of(raw.ended(14, message="no memory"))
    assert pod.ended == Ended(14, "Error", "no memory", LATER)
    assert pod.failed is None
    assert not pod.is_running


def test_a_container_that_was_killed_for_memory_says_so() -> None:
    assert pod_of(raw.ended(137, reason="OOMKilled")).ended == Ended(137, "OOMKilled", "", LATER)


def test_a_container_that_its_kubelet_lost_sight_of_ended_no_later_than_it_is_known() -> None:
    lost = {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown", "finishedAt": None}}
    pod = pod_of(raw.pod(status={"phase": "Failed", "containerStatuses": [container(lost)]}))
    assert pod.ended == Ended(137, "ContainerStatusUnknown", "", MADE)


def test_a_sidecar_that_ended_is_not_the_trainer() -> None:
    sidecar = container({"terminated": {"exitCode": 1, "finishedAt": raw.LATER}}, "logs")
    pod = pod_of(raw.pod(status={"phase": "Running", "containerStatuses": [sidecar, container({"running": {}})]}))
    assert pod.ended is None


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {
                "conditions": [
                    condition("DisruptionTarget", "True", "DeletionByTaintManager", "Taint manager: deleting")
                ]
            },
            "DeletionByTaintManager: Taint manager: deleting",
        ),
        (
            {"conditions": [condition("DisruptionTarget", "True", "EvictionByEvictionAPI", "Eviction API: evicting")]},
            "EvictionByEvictionAPI: Eviction API: evicting",
        ),
        ({"conditions": [condition("DisruptionTarget", "False", "", "")]}, None),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory"},
            "Evicted: The node was low on memory",
        ),
        (
            {"phase": "Unknown", "reason": "NodeLost", "message": "Node x is unresponsive"},
            "NodeLost: Node x is unresponsive",
        ),
        (
            {"phase": "Failed", "reason": "Terminated", "message": "imminent node shutdown"},
            "Terminated: imminent node shutdown",
        ),
        ({"phase": "Failed", "reason": "DeadlineExceeded"}, None),
    ],
    ids=["taint", "eviction", "no longer", "evicted", "node lost", "shutdown", "its own deadline"],
)
def test_a_pod_that_is_taken_away_says_by_what(status: raw.Raw, expected: str | None) -> None:
    assert pod_of(raw.pod(status=status)).disruption == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no healthy devices"},
            "UnexpectedAdmissionError: no healthy devices",
        ),
        (
            {
                "phase": "Failed",
                "initContainerStatuses": [
                    container({"terminated": {"exitCode": 1, "message": "no master\n"}}, "init-pytorch")
                ],
                "containerStatuses": [container({"waiting": {"reason": "PodInitializing"}})],
            },
            "init container init-pytorch ended with exit code 1: no master",
        ),
        ({"phase": "Failed"}, "it failed, and its node does not say why"),
        ({"phase": "Failed", "reason": "Evicted"}, None),
        ({"phase": "Pending"}, None),
    ],
    ids=["refused by its node", "init container", "wordless", "taken away", "pending"],
)
def test_a_pod_that_failed_before_its_container_ran_says_why(status: raw.Raw, expected: str | None) -> None:
    assert pod_of(raw.pod(status=status)).failed == expected


def test_a_pod_that_is_being_deleted_says_when_it_should_be_gone() -> None:
    assert pod_of(raw.pod(deletionTimestamp=raw.LATER)).deleting == LATER


@pytest.mark.parametrize(
    "given",
    [
        raw.pod(spec={"schedulingGroup": {"podGroupName": "lab-1"}}),
        raw.pod(annotations={"scheduling.k8s.io/group-name": "lab-1"}),
    ],
    ids=["native", "volcano"],
)
def test_a_pod_that_a_scheduler_places_with_its_gang_is_in_its_group(given: raw.Raw) -> None:
    assert pod_of(given).in_pod_group
    assert not pod_of(raw.pod()).in_pod_group


def test_a_pod_with_the_label_of_coscheduling_is_in_its_group() -> None:
    given = raw.pod()
    given["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] = "lab-1"
    assert pod_of(given).in_pod_group


def test_a_prepare_pod_belongs_to_no_attempt() -> None:
    given = raw.pod()
    given["metadata"]["labels"] |= {labels.ROLE: "prepare", labels.ATTEMPT: "0"}
    pod = pod_of(given)
    assert (pod.role, pod.attempt, pod.rank) == (Role.PREPARE, 0, 0)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, {}),
        ([condition("Created", "True", "PyTorchJobCreated")], {}),
        ([condition("Running", "False"), condition("Failed", "True", "JobFailed", "1 Worker replica(s) failed.")],
         {"failed": "1 Worker replica(s) failed.", "ended": LATER}),
        ([condition("Succeeded", "True", "JobSucceeded", "done")], {"succeeded": True, "ended": LATER}),
    ],
    ids=["no status at all", "created", "failed", "succeeded"],
)  # fmt: skip
def test_a_gang_says_how_it_stands(conditions: list[raw.Raw] | None, expected: dict[str, Any]) -> None:
    known = {"name": "lab-1", "uid": "uid-of-lab-1", "attempt": 1, "created": MADE, "owner": raw.UID}
    assert gang_of(raw.gang(conditions=conditions)) == Gang(**(known | expected))


def test_a_gang_that_a_queue_holds_back_is_queued_and_one_that_goes_is_deleting() -> None:
    assert gang_of(raw.gang(spec={"runPolicy": {"suspend": True}})).queued
    assert gang_of(raw.gang(deletionTimestamp=raw.LATER)).deleting


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, {}),
        ([condition("SuccessCriteriaMet"), condition("Complete")], {"complete": True}),
        (
            [condition("Failed", "True", "PodFailurePolicy", "Container pytorch failed with exit code 11")],
            {"failed": "PodFailurePolicy: Container pytorch failed with exit code 11"},
        ),
        ([condition("FailureTarget", "True", "BackoffLimitExceeded", "…")], {}),
    ],
    ids=["new", "complete", "failed", "about to fail"],
)
def test_the_preparation_says_how_it_stands(conditions: list[raw.Raw] | None, expected: dict[str, Any]) -> None:
    found = child("Job", raw.prepare_job(conditions))
    assert found is not None
    assert found.projection == PrepareJob("lab-prepare", "uid-of-lab-prepare", owner=raw.UID, **expected)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, {}),
        ([condition("PodGroupInitiallyScheduled", "True", "Scheduled")], {"scheduled": True}),
        (
            [condition("PodGroupInitiallyScheduled", "False", "Unschedulable", "minCount (2) cannot be satisfied")],
            {"message": "minCount (2) cannot be satisfied"},
        ),
    ],
    ids=["new", "scheduled", "unschedulable"],
)
def test_a_pod_group_says_why_it_is_not_scheduled(conditions: list[raw.Raw] | None, expected: dict[str, Any]) -> None:
    found = child("PodGroup", raw.pod_group(conditions=conditions))
    assert found is not None
    assert found.projection == PodGroup("lab-1", "group-1", owner=raw.UID, **expected)


def test_of_a_config_map_it_is_enough_that_it_is_there() -> None:
    found = child("ConfigMap", raw.config_map())
    assert found is not None
    assert (found.name, found.owner, found.is_collected, found.projection) == ("lab-run", raw.UID, True, None)


def test_what_kubernetes_does_not_collect_is_told_from_what_it_does() -> None:
    found = child("PyTorchJob", raw.gang(ownerReferences=[]))
    assert found is not None
    assert not found.is_collected


@pytest.mark.parametrize("label", [labels.JOB, labels.ROLE, labels.ATTEMPT])
def test_an_object_without_our_labels_is_not_ours(label: str) -> None:
    given = raw.pod()
    del given["metadata"]["labels"][label]
    assert child("Pod", given) is None


def test_an_object_with_other_labels_in_place_of_ours_is_not_ours() -> None:
    given = raw.gang()
    given["metadata"]["labels"][labels.ATTEMPT] = "first"
    assert child("PyTorchJob", given) is None


def test_an_object_belongs_to_the_sftjob_that_its_label_names() -> None:
    assert str(job_key("Pod", raw.pod())) == "team/lab"
    assert str(job_key("SFTJob", raw.job())) == "team/lab"
    given = raw.pod()
    given["metadata"]["labels"] = None
    assert job_key("Pod", given) is None


def test_a_status_of_a_newer_operator_is_read_without_what_is_not_known() -> None:
    given = raw.job() | {"status": {"state": "Running", "restarts": 2, "mood": "good", "goodput": 7}}
    status = job_status(given)
    assert (status.state, status.restarts, status.goodput) == (State.RUNNING, 2, None)


def test_warnings_are_told_the_newest_last() -> None:
    events = [
        {"reason": "FailedCreatePod", "message": "second", "lastTimestamp": "2026-11-24T12:00:02Z"},
        {"reason": "Unschedulable", "message": "first", "lastTimestamp": None, "eventTime": "2026-11-24T12:00:01.5Z"},
    ]
    assert troubles(events) == (Trouble("Unschedulable", "first"), Trouble("FailedCreatePod", "second"))
