"""What Flux, Config Sync and `helm --wait` make of a job: kstatus, in so many lines as it takes."""

from __future__ import annotations

from typing import Any

from sft_api.job import SFTJob
from sft_api.status import SFTJobStatus, State
from sft_operator.reconcile import reconcile
from tests.operator.builders import NOW, SETTINGS, make_job
from tests.operator.states.case import Case
from tests.operator.test_reconcile import TABLE

EXPECTED = {State.PENDING: "InProgress", State.FAILED: "Failed"}
"""By state; in every other the object is as its author wants it, and the training goes on."""


def kstatus(manifest: dict[str, Any]) -> str:
    """As cli-utils computes it for a custom resource."""
    metadata, status = manifest["metadata"], manifest.get("status") or {}
    truths = {found["type"]: found["status"] for found in status.get("conditions", [])}
    if "deletionTimestamp" in metadata:
        return "Terminating"
    if status.get("observedGeneration", metadata["generation"]) != metadata["generation"]:
        return "InProgress"
    if truths.get("Reconciling") == "True":
        return "InProgress"
    if truths.get("Stalled") == "True":
        return "Failed"
    return "InProgress" if truths.get("Ready", "True") != "True" else "Current"


def as_manifest(job: SFTJob) -> dict[str, Any]:
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)


def test_a_new_object_is_in_progress_by_the_default_of_its_status() -> None:
    assert kstatus(as_manifest(make_job(status=SFTJobStatus(observed_generation=0)))) == "InProgress"


@TABLE
def test_kstatus_agrees_with_the_state(case: Case) -> None:
    decision = reconcile(case.job, case.observed, SETTINGS, NOW)
    found = kstatus(as_manifest(case.job.model_copy(update={"status": decision.status})))
    if case.job.metadata.deletion_timestamp is not None:
        assert found == "Terminating"
    elif case.status is None or case.status.finished is None:
        assert decision.status.state is not None
        assert found == EXPECTED.get(decision.status.state, "Current")


@TABLE
def test_kstatus_waits_for_the_operator_to_see_a_change(case: Case) -> None:
    status = reconcile(case.job, case.observed, SETTINGS, NOW).status
    changed = make_job(case.spec, status, {"generation": 7})
    assert kstatus(as_manifest(changed)) == "InProgress"
