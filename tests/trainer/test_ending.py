"""The termination message: what a kubelet keeps of the end of a command, whole JSON however much there is to say."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from sft_api.report import TERMINATION_BYTES, Termination, TrainerReport
from sft_api.run import ExitCode
from sft_api.status import CheckpointStatus, ExportStatus, PhasePlanStatus, PlanStatus
from sft_trainer.ending import Outcome, finished, termination_message

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def a_plan(phases: int, name: str) -> PlanStatus:
    facts = {"samples": 10**6, "tokens": 10**9, "steps": 10**5, "dropped": 7, "truncated": 9, "fingerprint": "f" * 32}
    return PlanStatus(
        samples=phases * 10**6,
        tokens=phases * 10**9,
        phases=[PhasePlanStatus.model_validate({"name": f"{name}-{n}", **facts}, by_name=True) for n in range(phases)],
    )


def a_report(uri: str, problem: str | None = None) -> TrainerReport:
    checkpoint = CheckpointStatus(uri=uri, step=4, phase="one", time=NOW, verified=True)
    return TrainerReport(attempt=1, checkpoint=checkpoint, export=ExportStatus(uri=uri), checkpoint_problem=problem)


def test_the_termination_message_says_what_the_ending_and_the_first_rank_s_report_do() -> None:
    outcome = Outcome(30, "told to stop: step 4 is committed", 0, 4, 4, report=a_report("s3://b/k"))
    found = json.loads(termination_message(outcome))
    assert found["exitCode"] == 30
    assert found["reason"] == "Preempted"
    assert found["message"] == "told to stop: step 4 is committed"
    assert (found["rank"], found["step"], found["checkpointStep"]) == (0, 4, 4)
    assert found["report"]["checkpoint"]["time"] == "2026-11-24T12:00:00Z"
    assert Termination.model_validate(found).report == outcome.report
    assert finished(outcome).reason == found["reason"]


def test_a_plan_of_32_phases_with_long_names_is_told_as_far_as_there_is_room() -> None:
    outcome = Outcome(0, "the data of 3,200,000 steps is ready", plan=a_plan(32, "n" * 120))
    text = termination_message(outcome)
    assert TERMINATION_BYTES - 400 < len(text.encode()) <= TERMINATION_BYTES
    found = Termination.model_validate_json(text)
    assert found.plan is not None
    assert found.plan.samples == 32 * 10**6
    assert 5 < len(found.plan.phases) < 32
    assert found.message == outcome.message


OVERFLOWING = {
    "a long message": Outcome(11, "é" * 10_000),
    "a message that JSON makes six times as long": Outcome(11, "\x01" * 10_000),
    "a long message and a report": Outcome(13, "w" * 10_000, 0, 4, 4, report=a_report("s3://" + "k" * 1000)),
    "everything": Outcome(1, "w" * 9000, report=a_report("k" * 1024, "\x01" * 1024), plan=a_plan(32, "\x01" * 120)),
}


@pytest.mark.parametrize("outcome", OVERFLOWING.values(), ids=OVERFLOWING.keys())
def test_a_termination_message_is_whole_however_much_there_is_to_say(outcome: Outcome) -> None:
    text = termination_message(outcome)
    assert len(text.encode()) <= TERMINATION_BYTES
    found = Termination.model_validate_json(text)
    assert found.exit_code == outcome.code
    assert found.message.endswith("…")
    assert outcome.message.startswith(found.message[:-1])


def test_every_exit_code_has_its_name() -> None:
    assert {code: finished(Outcome(code, "")).reason for code in ExitCode} == {
        0: "Completed",
        10: "Configuration",
        11: "Data",
        12: "Model",
        13: "StoreRefused",
        14: "OutOfMemory",
        15: "Diverged",
        30: "Preempted",
        31: "Hung",
        32: "Communication",
        33: "StoreUnavailable",
    }
    assert finished(Outcome(137, "")).reason == "Failed"
    assert finished(Outcome(130, "")).reason == "Stopped"
