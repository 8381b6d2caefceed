"""What holds for every status: its order, its times, its bounds. What each condition says is in the table of states."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sft_api.status import ConditionType, SFTJobStatus
from sft_operator.conditions import Verdict, as_reason, clipped, conditions
from sft_operator.observed import Trouble
from sft_operator.reconcile import reconcile
from tests.operator.builders import (
    NOW,
    SETTINGS,
    all_running,
    ended_attempt,
    ended_pod,
    gang_of,
    make_attempt,
    make_job,
    make_pod,
    make_report,
    make_status,
)
from tests.operator.simulator import as_written
from tests.operator.states.case import Case
from tests.operator.test_reconcile import TABLE

LATER = NOW + timedelta(seconds=30)


def verdicts(status: str) -> dict[ConditionType, Verdict]:
    return {kind: Verdict(status, "Because", "…") for kind in ConditionType}  # type: ignore[arg-type]


def test_a_condition_keeps_the_time_at_which_its_status_changed() -> None:
    first = conditions([], verdicts("False"), 1, NOW)
    same = conditions(first, verdicts("False"), 2, LATER)
    other = conditions(same, verdicts("True"), 2, LATER)
    assert [found.last_transition_time for found in same] == [NOW] * len(ConditionType)
    assert [found.last_transition_time for found in other] == [LATER] * len(ConditionType)
    assert {found.observed_generation for found in same} == {2}


@TABLE
def test_every_status_has_all_conditions_in_their_order_and_within_the_schema(case: Case) -> None:
    status = reconcile(case.job, case.observed, SETTINGS, NOW).status
    assert as_written(status) == status
    if is_judged(case):
        assert [found.type for found in status.conditions] == [kind.value for kind in ConditionType]
        assert {found.observed_generation for found in status.conditions} == {case.job.metadata.generation}
        assert all(found.message for found in status.conditions)
        assert status.observed_generation == case.job.metadata.generation


def is_judged(case: Case) -> bool:
    """Whether the job goes on, or ends only now: what was said at the end stays."""
    had_ended = case.status is not None and case.status.finished is not None
    return not had_ended and case.job.metadata.deletion_timestamp is None


def test_long_messages_and_logs_are_cut_to_the_bounds_of_the_schema() -> None:
    evicted = ended_pod(1, 1, disruption="Evicted: " + "é" * 6000)
    observed = gang_of(make_pod(0), evicted, logs={evicted.name: "ü" * 10_000 + "the end"})
    status = reconcile(make_job(status=make_status(attempts=(make_attempt(),))), observed, SETTINGS, NOW).status
    [last] = status.attempts
    assert last.message is not None
    assert last.log is not None
    assert (len(last.message), last.message[-1]) == (4096, "…")
    assert (len(last.log), last.log[-7:]) == (8192, "the end")
    assert as_written(status) == status


def test_the_words_of_others_are_brought_into_the_bounds_of_the_schema() -> None:
    observed = gang_of(troubles=(Trouble("Failed to create: x", "y" * 9000),))
    before = make_status(attempts=(make_attempt(running=False),))
    status = reconcile(make_job(status=before), observed, SETTINGS, NOW).status
    assert as_written(status) == status


def test_a_status_as_large_as_it_gets_is_far_below_what_etcd_takes() -> None:
    attempts = tuple(
        ended_attempt(number, message="m" * 4096, log="l" * 8192, checkpoint_step=number) for number in range(1, 10)
    )
    status = make_status(attempts=(*attempts, make_attempt(10)))
    written = reconcile(make_job(status=status), all_running(10, report=make_report()), SETTINGS, NOW).status
    assert len(written.model_dump_json(by_alias=True, exclude_none=True)) < 150_000
    assert SFTJobStatus.model_validate_json(written.model_dump_json(by_alias=True)) == written


@pytest.mark.parametrize(
    ("word", "reason"),
    [("FailedCreatePod", "FailedCreatePod"), ("Failed create", "Failedcreate"), ("2nd", "nd"), ("…", "Unknown")],
)
def test_reasons_of_others_become_one_word(word: str, reason: str) -> None:
    assert as_reason(word) == reason


def test_a_text_is_cut_at_its_end() -> None:
    assert clipped("four", 4) == "four"
    assert clipped("fours", 4) == "fou…"
