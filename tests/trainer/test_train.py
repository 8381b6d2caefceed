"""Whole runs on gangs of gloo ranks: DeepSpeed, the data path, the store. Only what interrupts them is staged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sft_api import names
from sft_api.run import ExitCode, RunConfig
from sft_api.status import ExportStatus, PhaseStatus
from sft_trainer.fetch import fetch_model
from sft_trainer.model import load_model
from sft_trainer.plan import permutation, samples_digest
from sft_trainer.preparation import prepared_job
from sft_trainer.schedule import Schedule
from sft_trainer.split import open_data
from sft_trainer.store import Store
from sft_trainer.tokenizer import load_tokenizer
from tests.gang import Gangs
from tests.trainer.runs import Runs, Script, Told, figures, make_base, same_training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(gang: Gangs, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, base, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Told:
    """The run of `runs.SPEC` without any interruption, on one rank with ZeRO 1."""
    assert runs.run("straight").code == ExitCode.COMPLETED
    return runs.told("straight")


def expected_digests(config: RunConfig) -> Iterator[str]:
    """Which samples each step must hold, from the schedule alone."""
    data, _ = open_data(config, prepared_job(config))
    schedule = Schedule(config.phases, [len(phase.samples) for phase in data])
    cursor = schedule.start()
    while not schedule.is_done(cursor):
        phase = data[cursor.phase]
        order = permutation(len(phase.samples), config.seed, cursor.phase, cursor.epoch)
        start = cursor.step_in_epoch * phase.effective_batch_size
        members = phase.samples[order[start : start + phase.effective_batch_size]]
        yield samples_digest(phase.dataset.content[members])
        cursor = schedule.after(cursor, 0, 0, 0)


def test_every_step_of_the_schedule_is_taken_once_with_its_own_samples(runs: Runs, straight: Told) -> None:
    expected = list(expected_digests(runs.config("straight")))
    assert list(straight.steps) == list(range(1, len(expected) + 1))
    assert [step.samples_digest for step in straight.steps.values()] == expected
    assert max(straight.digests) == len(expected)


def reference_loss(config: RunConfig, samples: list[tuple[Any, Any]]) -> tuple[float, float, float]:
    """Loss, gradient norm and accuracy over unpacked samples, one by one, in plain torch."""
    folder = fetch_model(config.model, Path())
    tokenizer = load_tokenizer(folder, config.model)
    model = load_model(folder, config.model, tokenizer, config.trainer.precision, config.seed)
    total, count, hits = torch.zeros((), dtype=torch.float64), 0, 0
    for ids, is_target in samples:
        tokens = torch.from_numpy(ids.astype("int64"))[None]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        wanted = torch.from_numpy(is_target[1:].copy())
        targets = tokens[0, 1:][wanted]
        total = total + F.cross_entropy(logits[wanted], targets, reduction="sum")
        hits += int((logits[wanted].argmax(-1) == targets).sum())
        count += len(targets)
    (total / count).backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return float(total.detach()) / count, float(torch.stack(squares).sum().sqrt()), hits / count


def first_step(config: RunConfig) -> tuple[float, float]:
    """Loss and gradient norm of the first step of a run, by `reference_loss`."""
    data, _ = open_data(config, prepared_job(config))
    order = permutation(len(data[0].samples), config.seed, 0, 0)[: data[0].effective_batch_size]
    loss, norm, _ = reference_loss(config, [data[0].dataset.tokens(int(i)) for i in data[0].samples[order]])
    return loss, norm


def test_the_first_step_s_loss_and_gradient_norm_are_those_of_its_samples_one_by_one(
    runs: Runs, straight: Told
) -> None:
    loss, norm = first_step(runs.config("straight"))
    assert straight.steps[1].loss == pytest.approx(loss, rel=1e-6)
    assert straight.steps[1].grad_norm == pytest.approx(norm, rel=1e-5)


def test_the_held_out_loss_is_that_of_its_samples_one_by_one(runs: Runs, straight: Told) -> None:
    config = runs.config("straight")
    _, held_out = open_data(config, prepared_job(config))
    samples = [part.dataset.tokens(int(i)) for part in held_out for i in part.samples]
    loss, _, accuracy = reference_loss(config, samples)
    assert straight.validations[0].samples == len(samples)
    assert straight.validations[0].loss == pytest.approx(loss, rel=1e-6)
    assert straight.validations[0].accuracy == accuracy


STOPS = {
    "loading the model": (Script(stop_at="loading"), "told to stop before a step was taken; run again to go on", None),
    "restoring": (Script(stop_at="restoring"), "told to stop before a step was taken; run again to go on", None),
    "scoring before the first step": (
        Script(stop_at="scoring", chunk_samples=1),
        "told to stop before a step was taken; run again to go on",
        None,
    ),
    "scoring after a step": (
        Script(stop_at="scoring the held-out data after step 3", chunk_samples=1),
        "told to stop: step 3 is committed; run again to go on",
        3,
    ),
    "waiting for a commit": (Script(stop_at="waiting"), "told to stop: step 3 is committed; run again to go on", 3),
    "an export": (Script(stop_at="exporting"), "told to stop: step 6 is committed; run again to go on", 6),
}
"""When a run is told to stop, what it says, and the step that is then committed."""


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_at_any_time_ends_the_run_and_loses_nothing(runs: Runs, straight: Told, name: str) -> None:
    script, message, committed = STOPS[name]
    name = name.replace(" ", "-")
    changes = {"checkpoints": {"export": "PhaseEnd"}}
    ending = runs.run(name, changes=changes, script=script)
    assert (ending.code, ending.message) == (ExitCode.PREEMPTED, message)
    assert max(runs.told(name).digests, default=None) == committed
    assert runs.run(name, changes=changes).code == ExitCode.COMPLETED
    told = runs.told(name)
    same_training(told, straight, 1e-6)  # a score depends on how its samples are packed, which the script changes
    assert list(told.validations) == list(straight.validations)
    assert told.digests[max(told.digests)] == straight.digests[max(straight.digests)]


def test_the_report_of_a_run_in_attempts_counts_each_step_once(runs: Runs) -> None:
    changes = {"checkpoints": {"export": "End"}}
    runs.run("reported", changes=changes, script=Script(die_in=4))
    runs.run("reported", changes=changes, script=Script(stop_in=5))
    assert runs.run("reported", changes=changes).code == ExitCode.COMPLETED
    report, told = runs.report("reported"), runs.told("reported")
    last = max(told.steps)
    assert (report.attempt, report.resumed_from_step, report.complete) == (3, 7, True)
    assert report.phase == PhaseStatus(name="two", index=1, count=2)
    assert report.progress is not None
    assert (report.progress.step, report.progress.total_steps, report.progress.percent) == (last, last, 100)
    assert report.checkpoint is not None
    uri = f"{runs.uri('reported')}/ckpt/{last:08d}/3"
    assert (report.checkpoint.uri, report.checkpoint.verified) == (uri, True)
    assert report.export == ExportStatus(uri=f"{runs.uri('reported')}/export/two")
    assert report.productive_seconds == pytest.approx(sum(step.seconds for step in told.steps.values()))
    assert runs.run("reported", changes=changes).code == ExitCode.COMPLETED
    again = runs.report("reported")
    assert again.resumed_from_step == last
    assert again.model_copy(update={"attempt": 3, "resumed_from_step": 7, "progress": report.progress}) == report


def test_a_finished_run_is_finished_when_it_is_run_again(runs: Runs, straight: Told) -> None:
    before = runs.told("straight")
    assert runs.run("straight").code == ExitCode.COMPLETED
    assert figures(runs.told("straight")) == figures(before)


@pytest.mark.parametrize(("world", "stage"), [(2, 1), (2, 2), (2, 3), (3, 3)])
def test_ranks_and_stage_decide_who_computes_and_nothing_else(
    runs: Runs, straight: Told, world: int, stage: int
) -> None:
    name = f"world-{world}-stage-{stage}"
    assert runs.run(name, world, {"trainer": {"zeroStage": stage}}).code == ExitCode.COMPLETED
    same_training(runs.told(name), straight, 1e-6)


def test_padded_batches_train_the_same(runs: Runs, straight: Told) -> None:
    assert runs.run("padded", 2, {"batch": {"packing": "Padded"}}).code == ExitCode.COMPLETED
    same_training(runs.told("padded"), straight, 1e-6)


def test_by_length_walks_the_shorter_half_and_then_the_longer(runs: Runs) -> None:
    changes = {"strategy": "ByLength", "epochs": 2}
    assert runs.run("by-length", changes=changes).code == ExitCode.COMPLETED
    steps = list(runs.told("by-length").steps.values())
    config = runs.config("by-length", changes)
    (shorter, longer), held_out = open_data(config, prepared_job(config))
    assert [phase for phase, _ in groupby(step.phase for step in steps)] == ["shorter", "longer"]
    assert [step.samples_digest for step in steps] == list(expected_digests(config))
    lengths = shorter.dataset.lengths
    assert max(lengths[shorter.samples]) <= min(lengths[longer.samples])
    assert 0 <= len(shorter.samples) - len(longer.samples) <= 1
    everything = [*shorter.samples, *longer.samples, *held_out[0].samples]
    assert sorted(everything) == list(range(len(shorter.dataset)))
    assert steps[-1].samples == 2 * (len(shorter.samples) + len(longer.samples))


def test_stacked_mixes_all_phases_in_one(runs: Runs) -> None:
    changes = {"strategy": "Stacked", "epochs": 1}
    assert runs.run("stacked", changes=changes).code == ExitCode.COMPLETED
    config = runs.config("stacked", changes)
    data, _ = open_data(config, prepared_job(config))
    told = runs.told("stacked")
    assert {step.phase for step in told.steps.values()} == {"stacked"}
    assert told.steps[max(told.steps)].samples == len(data[0].samples)


def events(uri: str) -> list[dict[str, Any]]:
    """Of a run's first attempt."""
    return [json.loads(line) for line in Store.open(uri).get(names.events(1)).splitlines()]


def test_a_model_that_mixes_packed_samples_is_trained_padded_and_says_so_or_refused(
    gang: Gangs, tmp_path: Path
) -> None:
    runs = Runs(gang, make_base(tmp_path, architecture="falcon", alibi=False), tmp_path)
    ending = runs.run("refused", changes={"batch": {"packing": "Packed"}})
    assert ending.code == ExitCode.CONFIGURATION
    cause = "no backend keeps packed samples apart ("
    assert ending.message.startswith(
        f"spec.batch.packing: FalconForCausalLM cannot be trained packed: {cause}sample_sdpa: "
    )
    assert ending.message.endswith(". Set Auto or Padded")

    assert runs.run("padded", 2).code == ExitCode.COMPLETED
    (started,) = (event for event in events(runs.uri("padded")) if event["event"] == "started")
    assert started["packing"] == "Padded"
    assert started["attentionReason"].startswith(cause)
    assert started["attentionReason"].endswith("; padded batches, one sample a row")
    loss, norm = first_step(runs.config("padded"))
    first = runs.told("padded").steps[1]
    assert (first.loss, first.grad_norm) == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-5))


def test_a_model_with_experts_is_trained_with_its_balance_loss_and_says_so(gang: Gangs, tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    runs = Runs(gang, make_base(tmp_path, architecture="mixtral", **experts), tmp_path)
    assert runs.run("alone").code == ExitCode.COMPLETED
    alone = runs.told("alone")
    (words,) = (event["text"] for event in events(runs.uri("alone")) if event["event"] == "message")
    assert words.startswith("the config asks for a router auxiliary loss (coefficient 1.0): it is added")
    loss, norm = first_step(runs.config("alone"))
    assert alone.steps[1].loss == pytest.approx(loss, rel=1e-6)
    assert alone.steps[1].grad_norm != pytest.approx(norm, rel=1e-2)
    changes = {"trainer": {"zeroStage": 3, "activationCheckpointing": True}}
    assert runs.run("together", 2, changes, Script(stop_in=3)).code == ExitCode.PREEMPTED
    assert runs.run("together", 2, changes).code == ExitCode.COMPLETED
    same_training(runs.told("together"), alone, 1e-6)


def test_bf16_trains_on_every_stage_with_the_same_samples(runs: Runs, straight: Told) -> None:
    for world, stage in ((1, 1), (2, 2), (2, 3)):
        name = f"bf16-{stage}"
        changes = {"trainer": {"precision": "BF16", "zeroStage": stage, "activationCheckpointing": True}}
        assert runs.run(name, world, changes).code == ExitCode.COMPLETED
        same_training(runs.told(name), straight, 0.05)


def test_a_checkpoint_of_another_run_is_not_gone_on_from(runs: Runs) -> None:
    runs.run("other", script=Script(stop_in=2))
    ending = runs.run("other", changes={"optimizer": {"learningRate": 0.001}})
    assert ending.code == ExitCode.CONFIGURATION
    assert ending.message.startswith("spec.checkpoints.uri: ")
    assert "phase 0 (one): optimizer, phase 1 (two): optimizer differ from this run's" in ending.message


def test_the_best_checkpoints_are_kept_and_every_one_is_scored_for_it(runs: Runs) -> None:
    keep = {"last": 1, "phaseEnds": False, "best": 1}
    optimizer = {"learningRate": 0.5, "maxGradNorm": 1e6}  # the held-out loss soon rises
    held_out = {"fraction": 0.15, "every": None}
    changes = {"checkpoints": {"keep": keep}, "optimizer": optimizer, "validation": held_out}
    assert runs.run("best", changes=changes).code == ExitCode.COMPLETED
    told = runs.told("best")
    losses = {step: score.loss for step, score in told.validations.items() if step > 0}
    assert list(losses) == [2, 4, 6, 8, 10]
    assert set(told.digests) == {min(losses, key=losses.__getitem__), 10}


def test_the_model_of_every_phase_is_exported_once(runs: Runs) -> None:
    changes = {"checkpoints": {"export": "PhaseEnd"}}
    runs.run("exported", changes=changes, script=Script(stop_in=7))
    store = Store.open(runs.uri("exported"))
    assert store.head("export/one/COMPLETE") is not None
    first = store.head("export/one/MANIFEST.json")
    assert store.head("export/two/COMPLETE") is None
    assert runs.run("exported", changes=changes).code == ExitCode.COMPLETED
    assert store.head("export/two/COMPLETE") is not None
    assert store.head("export/one/MANIFEST.json") == first
