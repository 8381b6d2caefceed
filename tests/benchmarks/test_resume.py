"""The arithmetic of the comparison of resumes: which steps survive, and what they hold against the schedule."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.ledger import Step, history, tally
from benchmarks.resume import draw

BEGIN: dict[str, Any] = {"event": "begin"}


def step(epoch: int, *samples: int) -> dict[str, Any]:
    return {"event": "step", "epoch": epoch, "samples": list(samples)}


def save(name: str) -> dict[str, Any]:
    return {"event": "save", "checkpoint": name}


def load(name: str) -> dict[str, Any]:
    return {"event": "load", "checkpoint": name}


def test_steps_after_the_checkpoint_that_was_gone_back_to_are_not_in_the_weights() -> None:
    past = history([BEGIN, step(0, 1), save("a"), step(0, 2), step(0, 3), BEGIN, load("a"), step(0, 4)])
    assert past.steps == (Step(0, (1,)), Step(0, (4,)))
    assert past.steps_taken == 4
    assert past.attempts == 2


def test_an_attempt_that_loads_nothing_begins_with_nothing() -> None:
    assert history([BEGIN, step(0, 1), save("a"), BEGIN, step(0, 2)]).steps == (Step(0, (2,)),)


def test_a_checkpoint_that_was_saved_again_holds_what_it_was_saved_with_last() -> None:
    entries = [BEGIN, step(0, 1), save("a"), BEGIN, load("a"), step(0, 2), save("a"), step(0, 3), BEGIN, load("a")]
    assert history(entries).steps == (Step(0, (1,)), Step(0, (2,)))


def test_only_the_attempt_that_finishes_last_has_final_parameters() -> None:
    finish = {"event": "finish", "digest": "bits"}
    assert history([BEGIN, step(0, 1), finish]).digest == "bits"
    assert history([BEGIN, step(0, 1), finish, BEGIN]).digest is None


def test_a_checkpoint_that_nobody_saved_cannot_be_counted() -> None:
    with pytest.raises(KeyError, match="elsewhere"):
        history([BEGIN, load("elsewhere")])


def test_samples_are_lost_and_repeated_epoch_by_epoch() -> None:
    once_each = [Step(0, (0, 1)), Step(0, (2, 3))]
    assert tally(once_each, 4, 1).lost == tally(once_each, 4, 1).repeated == (0,)
    # In the second epoch 1 never comes, 0 comes three times, 2 twice; what another epoch saw does not make up for it.
    counted = tally([*once_each, Step(1, (0, 2)), Step(1, (0, 3)), Step(1, (0, 2))], 4, 2)
    assert counted.lost == (0, 1)
    assert counted.repeated == (0, 3)


def test_an_epoch_that_was_skipped_whole_has_lost_every_sample() -> None:
    assert tally([Step(0, (0, 1, 2)), Step(2, (2, 1, 0))], 3, 3).lost == (0, 3, 0)


@pytest.mark.parametrize(("kills", "steps"), [(1, 2), (5, 96), (7, 8), (30, 96)])
def test_every_interruption_comes_before_the_last_step_of_a_run_that_loses_nothing(kills: int, steps: int) -> None:
    for seed in range(50):
        after = draw(kills, steps, random.Random(seed))
        assert len(after) == kills
        assert min(after) >= 1
        assert sum(after) < steps


def test_more_interruptions_than_a_run_can_hold_are_refused() -> None:
    with pytest.raises(SystemExit, match="--kills 8 are too many: a run has 8 steps"):
        draw(8, 8, random.Random(0))
