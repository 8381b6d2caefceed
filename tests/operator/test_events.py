"""Which transitions of a job are told as events, and that none is told twice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sft_api.status import Condition, PhaseStatus, SFTJobStatus
from sft_operator.events import MESSAGE_CHARACTERS, Event, manifest, transitions
from tests.operator import raw
from tests.operator.builders import ended_attempt, make_attempt, make_condition, make_status

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def status(*conditions: Condition, **fields: Any) -> SFTJobStatus:
    return SFTJobStatus.model_validate({"conditions": list(conditions), **fields})


def told(old: SFTJobStatus, new: SFTJobStatus) -> list[tuple[str, str, str]]:
    return [(event.type, event.reason, event.message) for event in transitions(old, new)]


BEFORE_SUSPENSION = status(make_condition("Suspended", "False", "NotSuspended"))
SUSPENDED = status(make_condition("Suspended", "True", "Suspended"))
PENDING = status(make_condition("GangScheduled", "False", "Waiting"))
UNSCHEDULABLE = status(make_condition("GangScheduled", "False", "Unschedulable"), attempts=[make_attempt()])
ONE = make_attempt(running=False)
RUNNING = make_attempt()
FIRST = PhaseStatus(name="instruct", index=0, count=2)
SECOND = PhaseStatus(name="skills", index=1, count=2)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (SFTJobStatus(), make_status(), [("Normal", "Prepared", "…")]),
        (SFTJobStatus(), status(attempts=[ONE]), [("Normal", "AttemptStarted", "attempt granite-1 is made")]),
        (status(attempts=[ONE]), status(attempts=[RUNNING]), [("Normal", "GangRunning", "all pods of granite-1 run")]),
        (
            status(attempts=[RUNNING]),
            status(attempts=[ended_attempt(message="pod x ended")]),
            [("Warning", "AttemptEnded", "attempt granite-1 ended (Killed): pod x ended")],
        ),
        (
            status(attempts=[RUNNING]),
            status(attempts=[ended_attempt(reason="Completed", disruption=None, message="all done")]),
            [("Normal", "AttemptEnded", "attempt granite-1 ended (Completed): all done")],
        ),
        (status(), status(phase=FIRST), [("Normal", "PhaseStarted", "phase instruct, 1 of 2")]),
        (status(phase=FIRST), status(phase=SECOND), [("Normal", "PhaseStarted", "phase skills, 2 of 2")]),
        (BEFORE_SUSPENSION, SUSPENDED, [("Normal", "Suspended", "…")]),
        (SUSPENDED, BEFORE_SUSPENSION, [("Normal", "Resumed", "the job goes on")]),
        (SFTJobStatus(), BEFORE_SUSPENSION, []),
        (PENDING, UNSCHEDULABLE, [("Warning", "GangNotScheduled", "…"), *told(status(), status(attempts=[RUNNING]))]),
        (UNSCHEDULABLE, UNSCHEDULABLE, []),
        (
            status(make_condition("CheckpointHealthy", "True", "Committed")),
            status(make_condition("CheckpointHealthy", "False", "SaveFailing")),
            [("Warning", "CheckpointFailing", "…")],
        ),
        (status(), status(make_condition("Succeeded", "True", "Completed")), [("Normal", "Succeeded", "…")]),
        (status(), status(make_condition("Succeeded", "False", "Data")), [("Warning", "Failed", "Data: …")]),
        (make_status(attempts=(RUNNING,)), make_status(attempts=(RUNNING,), held_seconds=5.0), []),
    ],
    ids=[
        "prepared", "attempt", "runs", "failed attempt", "done attempt", "first phase", "next phase", "suspended",
        "resumed", "never suspended", "unschedulable", "still unschedulable", "save fails", "succeeded", "failed",
        "figures",
    ],
)  # fmt: skip
def test_a_transition_is_told_and_nothing_else(
    old: SFTJobStatus, new: SFTJobStatus, expected: list[tuple[str, str, str]]
) -> None:
    assert told(old, new) == expected


def test_an_event_that_is_told_again_has_the_same_name_and_is_refused_by_it() -> None:
    first = manifest(Event("GangRunning", "all pods run", "lab-1"), raw.job(), "a", NOW)
    again = manifest(Event("GangRunning", "ALL pods run", "lab-1"), raw.job(), "b", NOW + timedelta(hours=1))
    assert first["metadata"] == again["metadata"]


@pytest.mark.parametrize(
    "other",
    [
        manifest(Event("GangRunning", "all pods run", "lab-2"), raw.job(), "a", NOW),
        manifest(Event("AttemptStarted", "all pods run", "lab-1"), raw.job(), "a", NOW),
        manifest(
            Event("GangRunning", "all pods run", "lab-1"), {"metadata": raw.job()["metadata"] | {"uid": "x"}}, "a", NOW
        ),
    ],
    ids=["another attempt", "another reason", "another job of that name"],
)
def test_another_event_has_another_name(other: raw.Raw) -> None:
    first = manifest(Event("GangRunning", "all pods run", "lab-1"), raw.job(), "a", NOW)
    assert first["metadata"]["name"] != other["metadata"]["name"]


def test_an_event_is_about_its_sftjob_and_no_longer_than_events_may_be() -> None:
    job = raw.job()
    event = manifest(Event("Failed", "x" * 5000, type="Warning"), job, "sft-operator-0", NOW)
    assert event["involvedObject"] == {
        "apiVersion": "sftjob.dev/v1alpha1",
        "kind": "SFTJob",
        "name": "lab",
        "namespace": "team",
        "uid": raw.UID,
        "resourceVersion": job["metadata"]["resourceVersion"],
    }
    assert (event["type"], event["reason"], event["lastTimestamp"]) == ("Warning", "Failed", "2026-11-24T12:00:00Z")
    assert len(event["message"]) == MESSAGE_CHARACTERS
    assert event["reportingInstance"] == "sft-operator-0"
