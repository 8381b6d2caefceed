from __future__ import annotations

from typing import Any

import pytest

from sft_api.manifest import parse_job
from sft_api.recipes import resolve
from sft_api.run import Lengths, ResolvedPhase, RunConfig
from sft_api.spec import LearningRateSchedule, OptimizerState, Overlong, Packing, Warmup
from tests.api.jobs import document


def resolved(changes: dict[str, Any] | None = None) -> RunConfig:
    return resolve(parse_job(document(changes)))


def only_phase(changes: dict[str, Any] | None = None) -> ResolvedPhase:
    [phase] = resolved(changes).phases
    return phase


TABLE_1: dict[str, tuple[int, float, Warmup, LearningRateSchedule, int]] = {
    "LAB": (3840, 2e-5, Warmup(steps=25), LearningRateSchedule.CONSTANT, 10),
    "TULU": (128, 2e-5, Warmup(ratio=0.03), LearningRateSchedule.LINEAR, 3),
    "TULUPlusPlus": (128, 3e-5, Warmup(ratio=0.03), LearningRateSchedule.CONSTANT, 4),
}


@pytest.mark.parametrize("recipe", TABLE_1)
def test_a_recipe_is_table_1_of_the_paper(recipe: str) -> None:
    phase = only_phase({"spec.recipe": recipe})
    found = (
        phase.batch.effective_batch_size,
        phase.optimizer.learning_rate,
        phase.optimizer.warmup,
        phase.optimizer.schedule,
        phase.epochs,
    )
    assert found == TABLE_1[recipe]


def test_lab_is_the_recipe_unless_another_is_named() -> None:
    assert only_phase() == only_phase({"spec.recipe": "LAB"})


@pytest.mark.parametrize("recipe", ["LAB", "TULU", "TULUPlusPlus"])
def test_what_no_recipe_says_is_the_same_in_all(recipe: str) -> None:
    phase = only_phase({"spec.recipe": recipe})
    assert phase.optimizer.betas == (0.9, 0.95)
    assert (phase.optimizer.eps, phase.optimizer.weight_decay, phase.optimizer.max_grad_norm) == (1e-8, 0.0, 1.0)
    assert (phase.batch.max_sequence_length, phase.batch.overlong) == (4096, Overlong.TRUNCATE)


def test_packing_is_the_job_s_and_automatic_unless_said() -> None:
    assert resolved().packing is Packing.AUTO
    assert resolved({"spec.batch.packing": "Padded"}).packing is Packing.PADDED


def test_no_recipe_is_what_the_job_says_constant_and_without_warmup() -> None:
    phase = only_phase(
        {
            "spec.recipe": "none",
            "spec.epochs": 2,
            "spec.batch": {"effectiveBatchSize": 8},
            "spec.optimizer": {"learningRate": 1e-4},
        }
    )
    assert (phase.epochs, phase.batch.effective_batch_size, phase.optimizer.learning_rate) == (2, 8, 1e-4)
    assert (phase.optimizer.warmup, phase.optimizer.schedule) == (Warmup(steps=0), LearningRateSchedule.CONSTANT)


OVERRIDES: dict[str, tuple[Any, Any]] = {
    "spec.epochs": (2, lambda phase: phase.epochs),
    "spec.batch.effectiveBatchSize": (7680, lambda phase: phase.batch.effective_batch_size),
    "spec.batch.maxTokensPerGPU": (65536, lambda phase: phase.batch.max_tokens_per_gpu),
    "spec.batch.maxSequenceLength": (512, lambda phase: phase.batch.max_sequence_length),
    "spec.batch.overlong": ("Drop", lambda phase: phase.batch.overlong),
    "spec.optimizer.learningRate": (6e-6, lambda phase: phase.optimizer.learning_rate),
    "spec.optimizer.schedule": ("Cosine", lambda phase: phase.optimizer.schedule),
    "spec.optimizer.warmup": ({"steps": 0}, lambda phase: phase.optimizer.warmup.model_dump(exclude_none=True)),
    "spec.optimizer.betas": ([0, 0.5], lambda phase: list(phase.optimizer.betas)),
    "spec.optimizer.eps": (1e-6, lambda phase: phase.optimizer.eps),
    "spec.optimizer.weightDecay": (0.1, lambda phase: phase.optimizer.weight_decay),
    "spec.optimizer.maxGradNorm": (0.5, lambda phase: phase.optimizer.max_grad_norm),
}


@pytest.mark.parametrize("path", OVERRIDES)
def test_every_field_overrides_the_recipe(path: str) -> None:
    value, look = OVERRIDES[path]
    assert look(only_phase({path: value})) == value
    assert look(only_phase()) != value


@pytest.mark.parametrize("path", OVERRIDES)
def test_every_field_of_a_phase_overrides_the_job(path: str) -> None:
    value, look = OVERRIDES[path]
    changes = {"spec.strategy": "Phased", path.replace("spec.", "spec.phases[1]."): value}
    first, second = resolved(changes).phases
    assert look(second) == value
    assert look(first) != value


def test_a_phase_keeps_what_the_job_says_and_it_does_not() -> None:
    changes = {
        "spec.strategy": "Phased",
        "spec.optimizer": {"learningRate": 1e-4, "weightDecay": 0.1},
        "spec.phases[1].optimizer": {"weightDecay": 0},
    }
    second = resolved(changes).phases[1].optimizer
    assert (second.learning_rate, second.weight_decay) == (1e-4, 0.0)


@pytest.mark.parametrize(("length", "capacity"), [(512, 16384), (16384, 16384), (32768, 32768)])
def test_a_micro_batch_holds_a_sample_and_at_least_16384_tokens_by_default(length: int, capacity: int) -> None:
    assert only_phase({"spec.batch": {"maxSequenceLength": length}}).batch.max_tokens_per_gpu == capacity


def test_stacked_is_one_phase_of_all_data_named_by_their_paths() -> None:
    phase = only_phase({"spec.phases[0].data[1]": {"uri": "s3://lab/more.parquet"}})
    assert (phase.name, phase.lengths) == ("stacked", Lengths.ALL)
    assert [source.uri for source in phase.data] == [
        "s3://lab/instruct.jsonl",
        "s3://lab/more.parquet",
        "s3://lab/skills.jsonl",
    ]
    assert phase.data_paths == [
        "spec.phases[0].data[0].uri",
        "spec.phases[0].data[1].uri",
        "spec.phases[1].data[0].uri",
    ]


def test_phased_is_the_phases_in_their_order() -> None:
    phases = resolved({"spec.strategy": "Phased", "spec.phases[1].optimizer": {"state": "Reset"}}).phases
    assert [phase.name for phase in phases] == ["instruct", "skills"]
    assert [phase.data_paths for phase in phases] == [["spec.phases[0].data[0].uri"], ["spec.phases[1].data[0].uri"]]
    assert [phase.optimizer.state for phase in phases] == [OptimizerState.KEEP, OptimizerState.RESET]


def test_by_length_is_the_shorter_half_of_all_data_then_the_longer() -> None:
    shorter, longer = resolved({"spec.strategy": "ByLength"}).phases
    assert [(phase.name, phase.lengths) for phase in (shorter, longer)] == [
        ("shorter", Lengths.SHORTER),
        ("longer", Lengths.LONGER),
    ]
    assert shorter.data == longer.data
    assert len(shorter.data) == 2
    assert shorter.epochs == 10


@pytest.mark.parametrize(
    ("changes", "uri"),
    [
        ({}, "s3://lab/runs/granite/data"),
        ({"spec.checkpoints.uri": "s3://lab/runs/granite/"}, "s3://lab/runs/granite/data"),
        ({"spec.checkpoints.uri": "file://runs/granite"}, "file://runs/granite/data"),
        ({"spec.preparedData": {"uri": "s3://lab/prepared/"}}, "s3://lab/prepared"),
    ],
)
def test_prepared_data_lie_under_the_checkpoints_unless_elsewhere(changes: dict[str, Any], uri: str) -> None:
    assert resolved(changes).prepared_data_uri == uri


def test_a_run_config_comes_back_from_its_json() -> None:
    config = resolved({"spec.strategy": "Phased", "spec.validation": {"fraction": 0.1}})
    assert RunConfig.model_validate_json(config.model_dump_json(by_alias=True)) == config


def test_the_trainer_is_told_how_long_a_step_may_take() -> None:
    assert resolved().hang_timeout_seconds == 1800
    assert resolved({"spec.lifecycle": {"hangTimeoutSeconds": 60}}).hang_timeout_seconds == 60


def test_the_trainer_is_told_above_which_loss_a_run_has_diverged() -> None:
    assert resolved().loss_guard is None
    assert resolved({"spec.lifecycle": {"lossGuard": 9.5}}).loss_guard == 9.5


def test_the_trainer_is_told_nothing_of_pods_and_secrets() -> None:
    config = resolved(
        {
            "spec.trainer": {"nodes": 2, "image": "registry/of-ours", "env": [{"name": "A", "value": "of-ours"}]},
            "spec.checkpoints.credentials": {"secretRef": {"name": "of-ours"}},
        }
    )
    assert config.trainer.nodes == 2
    assert "of-ours" not in config.model_dump_json()


def test_a_run_config_of_before_there_was_a_hang_timeout_or_a_loss_guard_is_read() -> None:
    config = resolved().model_dump(mode="json", exclude={"hang_timeout_seconds", "loss_guard"})
    assert RunConfig.model_validate(config) == resolved()
