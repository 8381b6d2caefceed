"""What the engine does besides a plain step, for every ZeRO stage; that a step is exact is shown in test_exact."""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sft_api.run import ExitCode
from sft_api.spec import OptimizerState
from sft_trainer.engine import Engine, as_run_error, deepspeed_config, load_deepspeed, parameter_groups
from tests.gang import Gangs
from tests.trainer.engine_cases import (
    CPU,
    LEARNING_RATE,
    Part,
    Reference,
    Sample,
    SummedLoss,
    Whole,
    assemble,
    grad_of,
    largest_error,
    make_module,
    make_optimizer,
    make_samples,
    num_loss_tokens,
    parts,
    relative_error,
    running,
    take_step,
)

STAGES = [1, 2, 3]
WITHOUT_CLIPPING = 1e9


def masters(whole: Whole) -> dict[str, NDArray[np.float32]]:
    return {name: values["master"] for name, values in whole.items()}


def new_phase(stage: int, state: OptimizerState) -> list[Part]:
    with running(make_module(), stage) as engine:
        take_step(engine, make_samples(0, 6), stage)
        take_step(engine, make_samples(1, 6), stage)
        engine.configure(second_phase(state))
        take_step(engine, make_samples(2, 6), stage, 3e-4)
        take_step(engine, make_samples(3, 6), stage, 2e-4)
        return parts(engine)


def second_phase(state: OptimizerState) -> Any:
    return make_optimizer(betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1, max_grad_norm=0.3, state=state)


@pytest.mark.parametrize("state", list(OptimizerState))
@pytest.mark.parametrize("stage", STAGES)
def test_a_new_phase_brings_its_settings_and_keeps_or_resets_adam(
    gang: Gangs, stage: int, state: OptimizerState
) -> None:
    whole, adam_step = assemble(gang(2).run(new_phase, stage, state))

    reference = Reference(make_module(), make_optimizer())
    reference.step(make_samples(0, 6))
    reference.step(make_samples(1, 6))
    reference.configure(second_phase(state))
    reference.step(make_samples(2, 6), 3e-4)
    reference.step(make_samples(3, 6), 2e-4)

    assert adam_step == (2 if state is OptimizerState.RESET else 4)
    assert relative_error(masters(whole), reference.parameters()) < 1e-6


def bf16_sum_error(left_out: list[str]) -> float:
    """How far the gradient that Adam sees is from the exact sum of the same bf16 micro-gradients, relatively.

    `left_out`: keys to take from deepspeed's configuration under ZeRO 1, driven without our engine.
    """
    samples = make_samples(0, 64)
    exact = exact_sum(in_bf16(make_module(tied=True)), samples)
    return relative_error(adam_gradient_without(left_out, make_module(tied=True), samples), exact)


def in_bf16(module: SummedLoss) -> SummedLoss:
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    return module


def exact_sum(module: SummedLoss, samples: list[Sample]) -> dict[str, NDArray[np.float64]]:
    total = {name: np.zeros(p.numel()) for name, p in module.model.named_parameters()}
    for sample in samples:
        module.zero_grad()
        (module([sample]) / num_loss_tokens(samples)).backward()
        for name, parameter in module.model.named_parameters():
            total[name] += grad_of(parameter).double().numpy().ravel()
    return total


def adam_gradient_without(keys: list[str], module: SummedLoss, samples: list[Sample]) -> dict[str, NDArray[np.float32]]:
    """deepspeed on its own; stage 1 and one rank keep the parameters in order in one flat vector a group."""
    count = sum(parameter.numel() for parameter in module.parameters())
    config = deepspeed_config(1, True, WITHOUT_CLIPPING, count, CPU)
    config = {key: value for key, value in config.items() if key not in keys}
    adam = torch.optim.AdamW(parameter_groups(module), lr=LEARNING_RATE, betas=(0.0, 0.95))
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    layout = [[(names[id(p)], p.numel()) for p in group["params"]] for group in adam.param_groups]
    engine, *_ = load_deepspeed(CPU).initialize(model=module, optimizer=adam, config=config, dist_init_required=False)
    for index, sample in enumerate(samples):
        engine.set_gradient_accumulation_boundary(index + 1 == len(samples))
        engine.backward(engine([sample]) / num_loss_tokens(samples), scale_wrt_gas=False)
    engine.step()
    seen = {}
    for group, entries in zip(adam.param_groups, layout, strict=True):
        flat = adam.state[group["params"][0]]["exp_avg"].numpy()
        for name, size in entries:
            seen[name], flat = flat[:size], flat[size:]
    engine.destroy()
    return seen


@pytest.mark.parametrize(
    ("left_out", "error"),
    [
        pytest.param(["communication_data_type"], 5e-4, id="reduction"),
        pytest.param(["data_types", "communication_data_type"], 2e-3, id="accumulation"),
    ],
)
def test_without_the_two_keys_bf16_sums_are_rounded(gang: Gangs, left_out: list[str], error: float) -> None:
    """The keys that the engine sets are needed: this is the error it would have without them."""
    assert gang(1).run(bf16_sum_error, []) < [1e-6]
    assert gang(1).run(bf16_sum_error, left_out) > [error]


def poisoned(stage: int, bf16: bool) -> tuple[list[Part], list[Part], float, bool, bool]:
    """One good step, one in which a single rank's loss is not a number, and a good one again."""
    with running(make_module(), stage, bf16=bf16) as engine:
        take_step(engine, make_samples(0, 6), stage)
        before = parts(engine)
        poison = float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1.0
        engine.backward(engine(make_samples(1, 1)) * poison, last=True)
        norm, skipped = engine.step(LEARNING_RATE), engine.skipped
        after = parts(engine)
        take_step(engine, make_samples(2, 6), stage)
        return before, after, norm, skipped, engine.skipped


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_refused_aloud_on_every_rank(gang: Gangs, stage: int, bf16: bool) -> None:
    for before, after, norm, skipped, skipped_later in gang(2).run(poisoned, stage, bf16):
        assert skipped
        assert not np.isfinite(norm)
        assert not skipped_later
        for one, other in zip(before, after, strict=True):
            assert one.step == other.step
            assert all(np.array_equal(one.values[key], other.values[key]) for key in one.values)


def with_and_without_evaluation(stage: int, bf16: bool) -> tuple[bool, bool, bool, bool]:
    """Whether the state is the same; whether evaluation has dropout, or a gradient; whether training has dropout."""
    results = []
    for evaluates in (False, True):
        with running(make_module(), stage, bf16=bf16) as engine:
            for step in range(2):
                take_step(engine, make_samples(step, 6), stage)
                if evaluates:
                    with engine.evaluating():
                        loss = engine(make_samples(9, 2))
                        inside = engine.module.training, loss.requires_grad
                    outside = engine.module.training
            results.append(parts(engine))
    same = all(
        np.array_equal(one.values[key], other.values[key])
        for one, other in zip(*results, strict=True)
        for key in one.values
    )
    return same, *inside, outside


@pytest.mark.parametrize(("stage", "bf16"), [(1, True), (2, False), (3, True)])
def test_evaluation_between_steps_changes_nothing(gang: Gangs, stage: int, bf16: bool) -> None:
    assert gang(2).run(with_and_without_evaluation, stage, bf16) == [(True, False, False, True)] * 2


def start_of_bf16(stage: int) -> tuple[list[Part], dict[str, NDArray[np.float32]]]:
    with running(make_module(), stage, bf16=True) as engine:
        return parts(engine), {name: tensor.float().numpy() for name, tensor in engine.full_state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_masters_start_from_the_fp32_weights_unrounded(gang: Gangs, stage: int) -> None:
    answers = gang(2).run(start_of_bf16, stage)
    whole, adam_step = assemble([mine for mine, _ in answers])
    given = dict(make_module().model.named_parameters())
    assert adam_step == 0
    assert largest_error(masters(whole), {n: p.detach().numpy().ravel() for n, p in given.items()}) == 0.0
    weights = answers[0][1]
    assert largest_error(weights, {n: p.detach().bfloat16().float().numpy() for n, p in given.items()}) == 0.0


def export(stage: int, bf16: bool) -> tuple[list[Part], dict[str, NDArray[np.float32]], set[torch.dtype]]:
    with running(make_module(tied=True), stage, bf16=bf16) as engine:
        take_step(engine, make_samples(0, 6), stage)
        weights = engine.full_state_dict()
        return parts(engine), {n: t.float().numpy() for n, t in weights.items()}, {t.dtype for t in weights.values()}


@pytest.mark.parametrize(("stage", "bf16"), [(1, True), (2, False), (3, False), (3, True)])
def test_rank_0_gets_all_weights_in_bf16_and_tied_ones_once(gang: Gangs, stage: int, bf16: bool) -> None:
    first, second = gang(2).run(export, stage, bf16)
    whole, _ = assemble([first[0], second[0]])
    model = make_module(tied=True).model
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    rounded = {n: torch.from_numpy(v["master"]).bfloat16().float().view(shapes[n]).numpy() for n, v in whole.items()}
    assert "lm_head.weight" not in rounded
    assert largest_error(first[1], rounded) == 0.0
    assert first[2] == {torch.bfloat16}
    assert second[1] == {}


def words_on_stdout(stage: int, bf16: bool) -> str:
    with tempfile.NamedTemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            with running(make_module(), stage, bf16=bf16) as engine:
                take_step(engine, make_samples(0, 4), stage)
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
        return Path(file.name).read_text()


@pytest.mark.parametrize(("stage", "bf16"), [(1, True), (2, True), (3, False)])
def test_nothing_but_our_own_words_goes_to_stdout(gang: Gangs, stage: int, bf16: bool) -> None:
    assert gang(1).run(words_on_stdout, stage, bf16) == [""]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ExitCode.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ExitCode.OUT_OF_MEMORY),
        (MemoryError(), ExitCode.OUT_OF_MEMORY),
        (dist.DistBackendError("NCCL communicator was aborted"), ExitCode.COMMUNICATION),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), ExitCode.COMMUNICATION),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("out of memory"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lack_of_memory_and_a_broken_gang_are_told_apart_from_faults(error: Exception, code: ExitCode | None) -> None:
    known = as_run_error(error)
    assert (known.code if known else None) == code


def step_without_rank_1() -> str:
    engine = Engine(
        make_module(),
        stage=1,
        bf16=False,
        optimizer=make_optimizer(),
        device=CPU,
        timeout=timedelta(seconds=2),
        prefix="model.",
    )
    if dist.get_rank() == 1:
        return ""
    try:
        take_step(engine, make_samples(0, 2), 1)
    except RuntimeError as error:
        known = as_run_error(error)
        return known.code.name if known else repr(error)
    return "the step ended without rank 1"


def test_a_rank_that_stays_away_ends_the_step_by_the_engines_own_timeout(gang: Gangs) -> None:
    """deepspeed reduces in a process group of its own, which must not be left with half an hour."""
    answers = gang(2).run(step_without_rank_1, seconds=60.0)
    gang(2).end()
    assert answers == ["COMMUNICATION", ""]
