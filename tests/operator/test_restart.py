"""Which of several ends is believed, what is counted, and how long the next attempt waits."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sft_api.pods import Lifecycle
from sft_api.run import ExitCode
from sft_operator.observed import Pod
from sft_operator.restart import Cause, back_off_seconds, find_cause, give_up, reason_of, words
from tests.operator.builders import NOW, ago, ahead, ended_attempt, ended_pod, make_attempt, make_gang, make_pod

FAILED = make_gang(failed="1 replica(s) failed.", ended=ago(60))
EVICTED = {"deleting": ahead(290), "disruption": "EvictionByEvictionAPI: drained"}


def cause(*pods: Pod) -> Cause | None:
    return find_cause(FAILED, pods, make_attempt(), NOW)


@pytest.mark.parametrize(
    ("likelier", "other"),
    [
        pytest.param(ended_pod(1, 11), make_pod(0, **EVICTED), id="permanent before taken away"),
        pytest.param(ended_pod(1, 11), ended_pod(0, 137), id="permanent before failed"),
        pytest.param(make_pod(1, **EVICTED), ended_pod(0, 137), id="taken away before failed"),
        pytest.param(ended_pod(1, 30), ended_pod(0, 1), id="stopped, and saved, before failed"),
        pytest.param(ended_pod(1, 1), ended_pod(0, 30, deleting=ahead(9)), id="failed before stopped for its sake"),
        pytest.param(ended_pod(1, 137), ended_pod(0, 32), id="failed before who lost it"),
        pytest.param(ended_pod(1, 33), ended_pod(0, 32), id="lost the store before lost the peers"),
    ],
)
def test_the_likelier_cause_is_believed_whichever_pod_shows_it(likelier: Pod, other: Pod) -> None:
    for pods in ((likelier, other), (other, likelier)):
        found = cause(*pods)
        assert found is not None
        assert found.pod == likelier.name


def test_a_pod_on_its_way_out_may_end_in_any_way() -> None:
    found = cause(make_pod(0), ended_pod(1, 137, deleting=ahead(10)))
    assert found is not None
    assert (found.reason, found.disruption) == ("PodDeleted", True)
    assert found.message == "pod granite-1-worker-0 was deleted"


def test_an_evicted_pod_that_ended_well_is_no_cause() -> None:
    assert find_cause(make_gang(), [make_pod(0), ended_pod(1, 0, **EVICTED)], make_attempt(), NOW) is None


def test_a_gang_that_has_not_left_its_queue_has_not_ended() -> None:
    assert find_cause(make_gang(queued=True), [], make_attempt(running=False), NOW) is None
    taken = find_cause(make_gang(queued=True), [ended_pod(1, 30, gone=True)], make_attempt(running=False), NOW)
    assert taken is not None
    assert taken.disruption is True


@pytest.mark.parametrize(
    ("code", "reason"),
    [(13, "StoreRefused"), (14, "OutOfMemory"), (1, "Failed"), (130, "Killed"), (139, "Killed"), (255, "Failed")],
)
def test_exit_codes_have_names(code: int, reason: str) -> None:
    assert reason_of(code) == reason


def test_the_last_words_are_the_account_else_the_end_of_the_log() -> None:
    assert words(ended_pod(0, 1)) == "the trainer's words on 1"
    assert words(ended_pod(0, 1, message="x" * 2000 + "\nKeyError: 'text'\n")).endswith("xx\nKeyError: 'text'")
    assert len(words(ended_pod(0, 1, message="x" * 2000))) == 1024
    assert words(ended_pod(0, 137, message="", kubelet="Error")) == "Error; it left no message"


def test_budgets_allow_so_many_and_no_more() -> None:
    lifecycle = Lifecycle(max_restarts=2, max_disruptions=1)
    failed, taken = Cause("Killed", "it was killed"), Cause("Disrupted", "drained", disruption=True)
    assert give_up(failed, 2, 99, lifecycle) is None
    assert give_up(failed, 3, 0, lifecycle) == (
        "failed 3 times without a newer checkpoint, and spec.lifecycle.maxRestarts is 2; last: it was killed"
    )
    assert give_up(taken, 99, 1, lifecycle) is None
    assert give_up(taken, 0, 2, lifecycle) == (
        "disrupted 2 times, and spec.lifecycle.maxDisruptions is 1; last: drained"
    )
    assert give_up(Cause("Data", "line 7", permanent=True), 0, 0, lifecycle) == "line 7"


def test_back_off_doubles_up_to_five_minutes() -> None:
    attempts = [ended_attempt(number) for number in range(1, 9)]
    waits = [back_off_seconds(attempts[:count]) for count in range(1, 9)]
    assert waits == [10, 20, 40, 80, 160, 300, 300, 300]


def test_back_off_begins_anew_with_a_newer_checkpoint() -> None:
    steps = [0, 0, 100, 100, 200]
    attempts = [ended_attempt(number, checkpoint_step=step) for number, step in enumerate(steps, 1)]
    assert [back_off_seconds(attempts[:count]) for count in range(1, 6)] == [10, 20, 10, 20, 10]


def test_a_complaint_is_believed_after_fifteen_seconds() -> None:
    complaint = ended_pod(1, ExitCode.COMMUNICATION, seconds_ago=0)
    pods = [make_pod(0), complaint]
    assert find_cause(make_gang(), pods, make_attempt(), NOW + timedelta(seconds=14)) is None
    assert find_cause(make_gang(), pods, make_attempt(), NOW + timedelta(seconds=15)) is not None
