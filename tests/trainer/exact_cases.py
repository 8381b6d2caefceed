"""What the tests of exactness run on ranks: planned steps of real micro-batches, and the same in plain torch.

The reference is one process in fp32 that takes one unpacked sample after another; each rank computes it once.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from sft_api.run import ResolvedOptimizer
from sft_trainer.attention import choose_attention, padded_attention
from sft_trainer.balance import weigh_experts
from sft_trainer.batches import IGNORED, Step, StepLoader, shifted_labels
from sft_trainer.engine import Engine
from sft_trainer.loss import PackedLM
from sft_trainer.plan import Packer
from sft_trainer.prepare import Dataset
from sft_trainer.ranks import Ranks
from sft_trainer.split import PhaseData
from sft_trainer.state import Piece
from tests.trainer.architectures import tiny_model
from tests.trainer.engine_cases import CPU, LEARNING_RATE, Reference, SummedLoss, grad_of, make_optimizer, running

_BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
MADE: dict[str, dict[str, Any]] = {
    # Embeddings and MLP of over 100,000 elements: under ZeRO 3 they are gathered and let go; the rest stay.
    "llama": {"vocab_size": 1637, "intermediate_size": 1637, "tie_word_embeddings": False},
    # The embedding of padding would be zero, and a dummy's share in the balance as well.
    **{architecture: {**_BALANCED, "pad_token_id": None} for architecture in ("mixtral", "granitemoe", "qwen2_moe")},
}
WITH_EXPERTS = [architecture for architecture in MADE if architecture != "llama"]
L0 = 300.0
CLIPPED, WITHOUT_CLIPPING = 0.1, 1e9


@lru_cache(maxsize=2)
def made(architecture: str) -> PreTrainedModel:
    """Without the gain of other tests: with it what fp32 itself rounds comes to 8e-7 of the gradient."""
    return tiny_model(architecture, gain=1.0, **MADE[architecture])


class MadeData(Dataset):
    """Samples in memory, and which of them were read."""

    def __init__(self, samples: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]):
        self.samples = samples
        self.lengths = np.array([len(ids) for ids, _ in samples], np.int32)
        self.num_loss_tokens = np.array([is_target.sum() for _, is_target in samples], np.int32)
        self.content = np.arange(len(samples), dtype=np.uint64)
        self.read: list[int] = []

    def tokens(self, index: Any) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        self.read.append(int(index))
        return self.samples[index]


LENGTHS: dict[str, list[int]] = {
    "uneven": [31, 5, 40, 12, 3, 22, 17, 9, 28, 14, 38, 18, 27, 6, 25, 24],
    "fewer samples than ranks": [23, 7],
    "all of one length": [16] * 9,
    "one sample": [29],
    "uneven targets": [40, 38, 6, 33, 3, 12, 27],
}
"""The steps of the matrix, by the lengths of their samples."""


def step_data(name: str, vocabulary: int) -> MadeData:
    """About a third of the tokens bear loss; with uneven targets one sample's all do, and one of each of the others."""
    generator = np.random.default_rng([len(name), vocabulary])
    samples = []
    for index, length in enumerate(LENGTHS[name]):
        is_target = generator.random(length) < 1 / 3
        if name == "uneven targets":
            is_target[:] = index == 0
        is_target[0], is_target[-1] = False, True
        samples.append((generator.integers(0, vocabulary, length, dtype=np.int32), is_target))
    return MadeData(samples)


@dataclass(frozen=True)
class Case:
    """A step, and how it is cut into micro-batches."""

    step: str
    padded: bool
    capacity: int
    max_grad_norm: float = WITHOUT_CLIPPING

    def __str__(self) -> str:
        clipping = "" if self.max_grad_norm == WITHOUT_CLIPPING else ", clipped"
        return f"{self.step}, {'padded' if self.padded else 'packed'} in {self.capacity}{clipping}"


CAPACITIES = (40, 64, 1000)
"""The longest sample alone, an odd number of samples, and all of them."""


def all_cases() -> list[Case]:
    """Every step, packed and padded: in every capacity, and clipped."""
    ways = [(step, padded) for step in LENGTHS for padded in (False, True)]
    return [
        *(Case(step, padded, capacity) for step, padded in ways for capacity in CAPACITIES),
        *(Case(step, padded, CAPACITIES[0], CLIPPED) for step, padded in ways),
    ]


def packable(architecture: str) -> PreTrainedModel:
    model = copy.deepcopy(made(architecture))
    assert choose_attention(model, None, "cpu").backend == "sample_sdpa"
    return model


def set_attention(model: PreTrainedModel, padded: bool) -> None:
    """As it was chosen: the self-test would have to gather the parameters under ZeRO 3."""
    model.set_attn_implementation("sdpa" if padded else "sample_sdpa")


def planned(case: Case, stage: int, vocabulary: int) -> Step:
    """This rank's share of the case's step, as the loader of a run makes it."""
    data = step_data(case.step, vocabulary)
    packer = Packer(dist.get_world_size(), stage > 1, case.padded, L0)
    phase = PhaseData(data, np.arange(len(data)), len(data), case.capacity)
    loader = StepLoader(phase, packer, dist.get_rank(), CPU, 0, 0)
    return next(iter(loader.steps(0, 0, 1, 1)))


def take(engine: Engine, step: Step, learning_rate: float) -> float:
    """What the training loop does with a step; the norm before clipping."""
    module = engine.module
    assert isinstance(module, PackedLM)
    experts = weigh_experts(engine, module.balance, Ranks(dist.get_rank(), dist.get_world_size(), 0, CPU), step)
    for index, micro_batch in enumerate(step.mine):
        loss, _ = engine(**micro_batch, **experts)
        engine.backward(loss / step.num_loss_tokens, last=index + 1 == len(step.mine))
    return engine.step(learning_rate)


# ------------------------------------------------------------------------------------------- reference

Vectors = dict[str, NDArray[np.float32]]


class PlainTorch(Reference):
    """`Reference`, with the balance loss of models with experts as transformers computes it of the whole batch."""

    def _backward(self, samples: list[tuple[Tensor, Tensor]]) -> None:
        super()._backward(samples)
        model: Any = self.module.model
        if not getattr(model.config, "output_router_logits", False):
            return
        outputs = [model(input_ids=ids[None], use_cache=False, output_router_logits=True) for ids, _ in samples]
        layers = tuple(torch.cat(layer) for layer in zip(*(output.router_logits for output in outputs), strict=True))
        theirs = importlib.import_module(type(model).__module__).load_balancing_loss_func
        loss = theirs(layers, model.num_experts, model.num_experts_per_tok)
        (loss * model.config.router_aux_loss_coef).backward()


def as_tensors(data: MadeData) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(shifted_labels(ids, is_target)))
        for ids, is_target in data.samples
    ]


def plain(architecture: str, max_grad_norm: float) -> PlainTorch:
    model = copy.deepcopy(made(architecture))
    padded_attention(model)
    return PlainTorch(SummedLoss(model), make_optimizer(max_grad_norm=max_grad_norm))


@lru_cache(maxsize=16)
def plain_gradient(architecture: str, step: str) -> tuple[Vectors, float]:
    """The gradient of a step, not clipped, and its norm."""
    reference = plain(architecture, WITHOUT_CLIPPING)
    norm = reference.step(as_tensors(step_data(step, made(architecture).config.vocab_size)), 0.0)
    return reference.gradient(), norm


@lru_cache(maxsize=2)
def plain_parameters(architecture: str, steps: tuple[str, ...]) -> Vectors:
    """The parameters after these steps, each clipped."""
    reference = plain(architecture, CLIPPED)
    for step in steps:
        reference.step(as_tensors(step_data(step, made(architecture).config.vocab_size)))
    return reference.parameters()


# ---------------------------------------------------------------------------------------------- matrix


@dataclass(frozen=True)
class Share:
    """A rank's part of a comparison; the squares of all ranks add up to those of whole vectors."""

    difference: float
    size: float
    norm_error: float = 0.0
    """Of the gradient's norm before clipping, relatively."""
    micro_batches: int = 0
    dummies: int = 0


def error(shares: Sequence[Share], whole: float) -> float:
    """‖ours − reference‖ / ‖reference‖. `whole`: ‖reference‖², which the ranks' parts must make up."""
    assert math.isclose(sum(share.size for share in shares), whole, rel_tol=1e-9), "not every element is compared once"
    return math.sqrt(sum(share.difference for share in shares) / whole)


def squares(vectors: Vectors) -> float:
    return sum(float(np.square(vector.astype(np.float64)).sum()) for vector in vectors.values())


def compared(pieces: Sequence[Piece], key: str, truth: Vectors, factor: float = 1.0) -> Share:
    difference = size = 0.0
    for piece in pieces:
        expected = truth[piece.name][piece.start : piece.start + piece.count].astype(np.float64)
        ours = piece.tensors[key].double().numpy()  # type: ignore[index]
        difference += float(np.square(ours - expected * factor).sum()) / factor**2
        size += float(np.square(expected).sum())
    return Share(difference, size)


@dataclass(frozen=True)
class Compared:
    """One comparison on one rank."""

    share: Share
    whole: float


def remembers_the_gradient(max_grad_norm: float) -> ResolvedOptimizer:
    """Adam whose first moment is the clipped gradient itself."""
    return make_optimizer(betas=(0.0, 0.95), max_grad_norm=max_grad_norm)


def gradients(stage: int, architecture: str, cases: list[Case], checkpointing: bool = False) -> list[Compared]:
    """Each case's gradient against plain torch, all at the same parameters: nothing is learned."""
    model = packable(architecture).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    answers = []
    with running(PackedLM(model), stage, optimizer=remembers_the_gradient(CLIPPED)) as engine:
        for case in cases:
            set_attention(model, case.padded)
            engine.configure(remembers_the_gradient(case.max_grad_norm))
            step = planned(case, stage, model.config.vocab_size)
            norm = take(engine, step, 0.0)
            truth, expected = plain_gradient(architecture, case.step)
            clipped = min(1.0, case.max_grad_norm / (expected + 1e-6))
            share = compared(list(engine.pieces()), "exp_avg", truth, clipped)
            dummies = sum(bool((batch["labels"] == IGNORED).all()) for batch in step.mine)  # type: ignore[attr-defined]
            share = replace(share, norm_error=abs(norm / expected - 1), micro_batches=len(step.mine), dummies=dummies)
            answers.append(Compared(share, squares(truth)))
    return answers


def parameters(stage: int, architecture: str, cases: list[Case]) -> Compared:
    """The parameters after a step of each case, against plain torch."""
    model = packable(architecture)
    with running(PackedLM(model), stage, optimizer=make_optimizer(max_grad_norm=CLIPPED)) as engine:
        for case in cases:
            set_attention(model, case.padded)
            take(engine, planned(case, stage, model.config.vocab_size), LEARNING_RATE)
        truth = plain_parameters(architecture, tuple(case.step for case in cases))
        return Compared(compared(list(engine.pieces()), "master", truth), squares(truth))


def bf16_sums(stage: int, case: Case) -> Compared:
    """The gradient that Adam sees in bf16, against the exact sum of the same bf16 micro-gradients."""
    model = packable("llama")
    set_attention(model, case.padded)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    step = planned(case, stage, model.config.vocab_size)
    truth = exact_sums(PackedLM(copy.deepcopy(model)), step, dist.get_world_size() if stage == 3 else 1)
    with running(PackedLM(model), stage, bf16=True, optimizer=remembers_the_gradient(WITHOUT_CLIPPING)) as engine:
        take(engine, step, 0.0)
        return Compared(compared(list(engine.pieces()), "exp_avg", truth), squares(truth))


def exact_sums(module: PackedLM, step: Step, scale: int) -> Any:
    """In fp64, over this rank's micro-batches and then over ranks. `scale`: the loss's, which decides the rounding."""
    total = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in module.model.named_parameters()}
    for micro_batch in step.mine:
        module.zero_grad()
        loss, _ = module(**micro_batch)
        (loss / step.num_loss_tokens * scale).backward()
        for name, parameter in module.model.named_parameters():
            total[name] += grad_of(parameter).double().flatten() / scale
    for vector in total.values():
        dist.all_reduce(vector)
    return {name: vector.numpy() for name, vector in total.items()}
