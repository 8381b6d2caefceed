"""Runs that diverge: they say so, keep nothing of it, and commit what was on its way from before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sft_api.run import ExitCode
from sft_trainer.checkpoint.catalog import complete_places, open_checkpoint
from sft_trainer.store import Store
from tests.gang import Gangs
from tests.trainer.runs import Runs, Script, Told, make_base, make_poisoned_base

EVERY_STEP = {"every": {"steps": 1}}
TEMPLATE_WITHOUT_NEW_TOKENS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
)
"""New tokens would start at the mean of all embeddings, of which one is broken."""


@pytest.fixture(scope="module")
def poisoned(gang: Gangs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("poisoned")
    return Runs(gang, make_poisoned_base(folder), folder)


def broken_values(uri: str) -> tuple[int, set[str]]:
    """Step of the newest complete checkpoint, and which of its parameters have a weight or moment that is no number."""
    store = Store.open(uri)
    step, number = max(complete_places(store))
    checkpoint = open_checkpoint(store, step, number)
    broken = set()
    for name, shape in checkpoint.shapes().items():
        for key in ("master", "exp_avg", "exp_avg_sq"):
            if not np.isfinite(checkpoint.read(name, key, 0, int(np.prod(shape)))).all():
                broken.add(f"{key} of {name}")
    return step, broken


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 1), (2, 3)])
def test_nothing_is_kept_of_a_step_that_is_no_number_and_the_save_before_it_is_committed(
    poisoned: Runs, world: int, stage: int
) -> None:
    name = f"diverging-{world}-{stage}"
    changes = {
        "model": {"chatTemplate": {"inline": TEMPLATE_WITHOUT_NEW_TOKENS}},
        "validation": None,
        "checkpoints": EVERY_STEP,
        "trainer": {"zeroStage": stage},
    }
    ending = poisoned.run(name, world, changes)
    assert ending.code == ExitCode.DIVERGED
    # The first phase has 8 steps; the data of the second is poisoned.
    assert ending.message.partition(": the run has diverged.")[0] == "step 9 has loss nan and gradient norm inf"
    assert list(poisoned.told(name).digests) == list(range(1, 9))
    # The poison of the base is still there, and has spread to nothing else.
    assert broken_values(poisoned.uri(name)) == (8, {"master of model.embed_tokens.weight"})


@pytest.mark.parametrize("world", [1, 2])
def test_a_held_out_loss_that_is_no_number_ends_the_run_before_the_save_that_it_belongs_to(
    poisoned: Runs, world: int
) -> None:
    held_out = {"uri": f"file://{poisoned.base}/two.jsonl", "fraction": None}
    name = f"scored-{world}"
    model = {"chatTemplate": {"inline": TEMPLATE_WITHOUT_NEW_TOKENS}}
    ending = poisoned.run(name, world, {"model": model, "validation": held_out})
    assert ending.code == ExitCode.DIVERGED
    assert ending.message.startswith("the held-out data after step 0 has loss nan: the run has diverged.")
    assert poisoned.told(name).digests == {}


RISING: dict[str, Any] = {
    "optimizer": {"learningRate": 0.5, "maxGradNorm": 1e6},
    "checkpoints": EVERY_STEP,
    "validation": {"every": None},
}
"""The loss soon rises."""


@pytest.fixture(scope="module")
def runs(gang: Gangs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, make_base(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def rising(runs: Runs) -> Told:
    """A run whose loss rises, with nothing to guard it."""
    assert runs.run("rising", 2, RISING).code == ExitCode.COMPLETED
    return runs.told("rising")


def first_rise(told: Told) -> tuple[int, float]:
    """The first step whose loss is above that of all before it, and a limit between."""
    losses = [step.loss for step in told.steps.values()]
    rise = next(index for index in range(1, len(losses)) if losses[index] > max(losses[:index]))
    return rise + 1, (losses[rise] + max(losses[:rise])) / 2


def guarded(limit: float) -> dict[str, Any]:
    return {**RISING, "lifecycle": {"lossGuard": limit}}


def test_a_loss_above_the_guard_ends_the_run_and_it_goes_on_with_a_higher_one(runs: Runs, rising: Told) -> None:
    step, limit = first_rise(rising)
    ending = runs.run("guarded", 2, guarded(limit))
    loss = rising.steps[step].loss
    assert ending.code == ExitCode.DIVERGED
    assert ending.message == (
        f"step {step} has loss {loss:.4g}, above spec.lifecycle.lossGuard {limit:g}: the run has diverged. The"
        " checkpoints are from before it; lower spec.optimizer.learningRate, look for broken samples, or raise"
        " spec.lifecycle.lossGuard"
    )
    assert list(runs.told("guarded").digests) == list(range(1, step))
    assert runs.run("guarded", 2, RISING).code == ExitCode.COMPLETED
    assert runs.told("guarded").digests == rising.digests


def test_a_guard_that_is_set_while_the_run_goes_on_counts_as_the_first_rank_is_told(runs: Runs, rising: Told) -> None:
    step, limit = first_rise(rising)
    late = step + 1
    lower = min(rising.steps[late].loss, limit) / 2
    ending = runs.run("guarded-late", 2, RISING, Script(loss_guard_in=(late, lower)))
    assert ending.code == ExitCode.DIVERGED
    assert ending.message.startswith(f"step {late} has loss ")
    assert max(runs.told("guarded-late").digests) == step


def test_a_held_out_loss_above_the_guard_ends_the_run(runs: Runs, rising: Told) -> None:
    loss = rising.validations[0].loss
    ending = runs.run("guarded-score", 2, guarded(loss * 0.99))
    assert ending.code == ExitCode.DIVERGED
    assert ending.message.startswith(f"the held-out data after step 0 has loss {loss:.4g}, above spec.lifecycle.lossG")
    assert runs.told("guarded-score").digests == {}
