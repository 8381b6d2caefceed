"""What is worth an event: the transitions between two statuses of a job. Pure.

An event's name is made from what it tells, so that telling it again is refused by the API server and nothing repeats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sft_api.job import API_VERSION, KIND
from sft_api.labels import MANAGER
from sft_api.status import Attempt, Condition, ConditionType, SFTJobStatus
from sft_operator.observed import Manifest
from sft_operator.views import Raw

MESSAGE_CHARACTERS = 1024
HELD_UP = frozenset({"Unschedulable", "PodGroupMissing", "NotInPodGroup", "SchedulerMissing"})
"""Reasons of GangScheduled that somebody may have to do something about."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a job."""

    reason: str
    message: str
    which: str = ""
    """Tells it from another of the same reason: an attempt, a phase, a time. Empty for what happens once to a job."""
    type: Literal["Normal", "Warning"] = "Normal"


def transitions(old: SFTJobStatus, new: SFTJobStatus) -> list[Event]:
    """What happened between the two, in the order of a job's life."""
    found = [*of_conditions(old, new), *of_attempts(old, new)]
    if new.phase is not None and (old.phase is None or old.phase.index != new.phase.index):
        phase = new.phase
        found.append(Event("PhaseStarted", f"phase {phase.name}, {phase.index + 1} of {phase.count}", phase.name))
    return [*found, *of_the_end(old, new)]


def of_conditions(old: SFTJobStatus, new: SFTJobStatus) -> Iterator[Event]:
    if prepared := turned(old, new, ConditionType.PREPARED, "True"):
        yield Event("Prepared", prepared.message)
    gang = found(new, ConditionType.GANG_SCHEDULED)
    before = found(old, ConditionType.GANG_SCHEDULED)
    if gang and gang.reason in HELD_UP and not (before and before.reason == gang.reason):
        attempt = new.attempts[-1].name if new.attempts else ""
        yield Event("GangNotScheduled", gang.message, f"{attempt} {gang.reason}", "Warning")
    if failing := turned(old, new, ConditionType.CHECKPOINT_HEALTHY, "False"):
        yield Event("CheckpointFailing", failing.message, str(failing.last_transition_time), "Warning")
    if suspended := turned(old, new, ConditionType.SUSPENDED, "True"):
        yield Event("Suspended", suspended.message, str(suspended.last_transition_time))
    resumed = turned(old, new, ConditionType.SUSPENDED, "False")
    if resumed and found(old, ConditionType.SUSPENDED):
        yield Event("Resumed", "the job goes on", str(resumed.last_transition_time))


def of_attempts(old: SFTJobStatus, new: SFTJobStatus) -> Iterator[Event]:
    known = {attempt.name: attempt for attempt in old.attempts}
    for attempt in new.attempts:
        before = known.get(attempt.name)
        if before is None:
            yield Event("AttemptStarted", f"attempt {attempt.name} is made", attempt.name)
        if attempt.running and not (before and before.running):
            yield Event("GangRunning", f"all pods of {attempt.name} run", attempt.name)
        if attempt.ended and not (before and before.ended):
            yield Event("AttemptEnded", how_it_ended(attempt), attempt.name, seriousness(attempt))


def of_the_end(old: SFTJobStatus, new: SFTJobStatus) -> Iterator[Event]:
    if succeeded := turned(old, new, ConditionType.SUCCEEDED, "True"):
        yield Event("Succeeded", succeeded.message)
    if failed := turned(old, new, ConditionType.SUCCEEDED, "False"):
        yield Event("Failed", f"{failed.reason}: {failed.message}", str(failed.last_transition_time), "Warning")


def turned(old: SFTJobStatus, new: SFTJobStatus, kind: ConditionType, status: str) -> Condition | None:
    """The condition, if it has this status now and had another."""
    now, before = found(new, kind), found(old, kind)
    return now if now and now.status == status and not (before and before.status == status) else None


def found(status: SFTJobStatus, kind: ConditionType) -> Condition | None:
    return next((condition for condition in status.conditions if condition.type == kind), None)


def how_it_ended(attempt: Attempt) -> str:
    return f"attempt {attempt.name} ended ({attempt.reason}): {attempt.message}"


def seriousness(attempt: Attempt) -> Literal["Normal", "Warning"]:
    """An attempt that was asked to end, or is done, is no reason to warn."""
    return "Normal" if attempt.disruption is None else "Warning"


def manifest(event: Event, about: Raw, reporter: str, now: datetime) -> Manifest:
    """The event about this SFTJob as an object."""
    metadata = about["metadata"]
    told = "\n".join((metadata["uid"], event.reason, event.which))
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    involved: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND}
    involved |= {name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hashlib.sha256(told.encode()).hexdigest()[:16]}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": involved,
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:MESSAGE_CHARACTERS],
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "reportingInstance": reporter,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
