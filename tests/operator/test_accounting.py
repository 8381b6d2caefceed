"""What a job has achieved and what it has cost, as its status says."""

from __future__ import annotations

from datetime import timedelta

from sft_api.report import TrainerReport
from sft_api.status import SFTJobStatus, State
from sft_operator.observed import Observed
from sft_operator.reconcile import reconcile
from tests.operator.builders import (
    NOW,
    SETTINGS,
    ago,
    ahead,
    all_running,
    ended_attempt,
    ended_pod,
    gang_of,
    make_account,
    make_attempt,
    make_checkpoint,
    make_condition,
    make_job,
    make_observed,
    make_pod,
    make_progress,
    make_report,
    make_status,
    pending_pod,
)

RUNNING = make_status(attempts=(make_attempt(),))


def decided(
    observed: Observed, status: SFTJobStatus | None = RUNNING, after: float = 0.0, **spec: object
) -> SFTJobStatus:
    now = NOW + timedelta(seconds=after)
    return reconcile(make_job(spec, status), observed, SETTINGS, now).status


def test_what_the_first_rank_says_stands_in_the_status() -> None:
    report = make_report(120, checkpoint=100, resumed_from_step=40)
    status = decided(all_running(report=report))
    assert (status.phase, status.progress, status.checkpoint) == (report.phase, report.progress, report.checkpoint)
    assert status.attempts[-1].resumed_from_step == 40


def test_what_is_not_said_stays_as_it_was() -> None:
    known = make_status(attempts=(make_attempt(),), progress=make_progress(90), checkpoint=make_checkpoint(80))
    status = decided(all_running(report=TrainerReport(attempt=1)), known)
    assert status.progress == known.progress
    assert status.checkpoint == known.checkpoint


def test_a_figure_that_is_no_number_is_left_out() -> None:
    progress = make_progress(loss=float("nan"), grad_norm=float("inf"), tokens_per_second=1e5)
    told = decided(all_running(report=make_report(progress=progress))).progress
    assert told is not None
    assert (told.loss, told.grad_norm, told.tokens_per_second) == (None, None, 1e5)


def test_a_gang_holds_its_nodes_from_the_first_pods_place_to_the_last_pods_end() -> None:
    observed = gang_of(make_pod(0, scheduled=ago(100)), ended_pod(1, 0, scheduled=ago(80), seconds_ago=20))
    status = decided(observed)
    assert status.attempts[-1].held_seconds == (100 + 60) / 2
    assert status.held_seconds == 80
    assert status.gpu_seconds == 80 * 16


def test_pods_without_a_node_hold_nothing() -> None:
    assert decided(gang_of(pending_pod(0), pending_pod(1))).held_seconds == 0


def test_time_held_is_counted_once_and_kept_when_the_pods_are_gone() -> None:
    status = decided(all_running())
    assert status.held_seconds == 600
    status = decided(all_running(), status, after=10)
    assert status.held_seconds == 610
    assert decided(make_observed(), status, after=20).held_seconds == 610


def test_time_held_adds_up_over_attempts() -> None:
    before = make_status(attempts=(ended_attempt(1, held_seconds=50.0), make_attempt(2)), held_seconds=50.0)
    status = decided(all_running(2), before)
    assert status.held_seconds == 650
    assert [attempt.held_seconds for attempt in status.attempts] == [50, 600]


def test_pods_on_their_way_out_still_hold_their_nodes() -> None:
    leaving = gang_of(make_pod(0, deleting=ahead(200)), make_pod(1, deleting=ahead(200)))
    before = make_status(
        State.RESTARTING,
        attempts=(make_attempt(ended=ago(30), reason="Killed", disruption=False, held_seconds=570.0),),
        held_seconds=570.0,
        restarts=1,
    )
    assert decided(leaving, before).held_seconds == 600


def test_goodput_is_the_share_that_still_counts() -> None:
    assert decided(all_running(report=make_report(productive_seconds=450.0))).goodput == 0.75
    assert decided(all_running(report=make_report(productive_seconds=700.0))).goodput == 1.0
    assert decided(all_running()).goodput is None


def test_a_checkpoint_committed_on_the_way_out_belongs_to_its_attempt() -> None:
    account = make_account(30, report=make_report(checkpoint=140)).model_dump_json(by_alias=True)
    before = make_status(
        State.RESTARTING,
        attempts=(ended_attempt(1, "Disrupted", disruption=True, checkpoint_step=100),),
        checkpoint=make_checkpoint(100),
    )
    status = decided(make_observed(pods=(ended_pod(0, 30, message=account, gone=True),)), before)
    assert status.attempts[0].checkpoint_step == 140


def test_time_suspended_is_added_up_when_the_job_goes_on() -> None:
    held = make_status(State.SUSPENDED, attempts=(ended_attempt(1, "Suspended", disruption=None),))
    since = [*held.conditions, make_condition("Suspended", "True", "Suspended", ago(300))]
    held = held.model_copy(update={"conditions": since, "suspended_seconds": 60.0})
    assert decided(make_observed(), held, suspend=True).suspended_seconds == 60
    resumed = decided(make_observed(), held)
    assert resumed.suspended_seconds == 360
    assert decided(make_observed(), resumed, after=10).suspended_seconds == 360


def test_times_are_whole_seconds() -> None:
    now = NOW.replace(microsecond=250_000)
    status = reconcile(make_job(), make_observed(prepare=None), SETTINGS, now).status
    assert {condition.last_transition_time for condition in status.conditions} == {NOW}
