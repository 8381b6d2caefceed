"""What the engine's tests run on ranks: a tiny Llama, uneven batches, and the same steps in plain torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sft_api.run import ResolvedOptimizer
from sft_api.spec import LearningRateSchedule, OptimizerState, Warmup
from sft_trainer.engine import Engine
from sft_trainer.state import STATE_KEYS, StateKey

CPU = torch.device("cpu")
VOCABULARY = 5003
LEARNING_RATE = 1e-3
Sample = tuple[Tensor, Tensor]
MicroBatches = list[list[Sample]]
"""A rank's share of a step: samples, micro-batch by micro-batch."""
Whole = dict[str, dict[StateKey, NDArray[np.float32]]]


def make_optimizer(**changes: Any) -> ResolvedOptimizer:
    """Adam's epsilon is not 1e-8: it would blow the last bits of gradients of 1e-9 up to a percent of the step."""
    defaults = ResolvedOptimizer(
        learning_rate=LEARNING_RATE,
        schedule=LearningRateSchedule.CONSTANT,
        warmup=Warmup(steps=0),
        betas=(0.9, 0.95),
        eps=1e-6,
        weight_decay=0.0,
        max_grad_norm=0.5,
        state=OptimizerState.KEEP,
    )
    return defaults.model_copy(update=changes)


class SummedLoss(nn.Module):
    """A causal model whose forward pass is the summed cross entropy of samples, padded on the right."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, samples: Sequence[Sample]) -> Tensor:
        tokens = pad_sequence([tokens for tokens, _ in samples], batch_first=True)
        labels = pad_sequence([labels for _, labels in samples], batch_first=True, padding_value=-100)
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def make_module(seed: int = 0, *, tied: bool = False) -> SummedLoss:
    """A Llama of two layers in fp32, whose parameters divide by nothing.

    The embeddings and the MLP have over 100,000 elements each: under ZeRO 3 they are gathered and let go, while the
    smaller ones stay on every rank.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=5101,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    return SummedLoss(LlamaForCausalLM(config))


def make_samples(step: int, count: int) -> list[Sample]:
    """Samples of 3 to 40 tokens, between one and all of which bear loss."""
    generator = np.random.default_rng([7, step])
    return [make_sample(generator) for _ in range(count)]


def make_sample(generator: np.random.Generator) -> Sample:
    length = int(generator.integers(3, 41))
    tokens = generator.integers(0, VOCABULARY, length)
    labels = np.where(generator.random(length) < generator.random(), generator.integers(0, VOCABULARY, length), -100)
    labels[0] = 1
    return torch.from_numpy(tokens), torch.from_numpy(labels)


DUMMY: Sample = (torch.tensor([1, 2]), torch.tensor([-100, -100]))


def share(samples: list[Sample], stage: int) -> MicroBatches:
    """This rank's micro-batches of two samples. Under ZeRO 2 and 3 a rank that has fewer gets dummies."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = [samples[first::world] for first in range(world)]
    counts = [max(1, -(-len(mine) // 2)) for mine in shares]
    mine = [shares[rank][start : start + 2] for start in range(0, len(shares[rank]), 2)]
    wanted = counts[rank] if stage == 1 else max(counts)
    return mine + [[DUMMY]] * (wanted - len(mine))


def num_loss_tokens(samples: list[Sample]) -> int:
    return sum(int((labels != -100).sum()) for _, labels in samples)


@contextlib.contextmanager
def running(
    module: nn.Module, stage: int, *, bf16: bool = False, optimizer: ResolvedOptimizer | None = None
) -> Iterator[Engine]:
    engine = Engine(
        module,
        stage=stage,
        bf16=bf16,
        optimizer=optimizer or make_optimizer(),
        device=CPU,
        timeout=timedelta(minutes=3),
        prefix="model.",
    )
    try:
        yield engine
    finally:
        engine.destroy()


def take_step(engine: Engine, samples: list[Sample], stage: int, learning_rate: float = LEARNING_RATE) -> float:
    """One optimizer step over `samples`, spread over the ranks; the norm before clipping."""
    mine = share(samples, stage)
    for index, micro_batch in enumerate(mine):
        engine.backward(engine(micro_batch) / num_loss_tokens(samples), last=index + 1 == len(mine))
    return engine.step(learning_rate)


@dataclass(frozen=True)
class Part:
    """A Piece that can travel between processes."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[StateKey, NDArray[np.float32]]
    step: int


def parts(engine: Engine) -> list[Part]:
    return [
        Part(p.name, p.shape, p.start, {key: t.numpy().copy() for key, t in p.tensors.items()}, p.step)
        for p in engine.pieces()
    ]


def assemble(of_all_ranks: Sequence[list[Part]]) -> tuple[Whole, int]:
    """Whole parameters out of every rank's parts, which must cover each element once; and Adam's step."""
    whole: Whole = {}
    covered: dict[str, NDArray[np.int64]] = {}
    steps = set()
    for part in (part for mine in of_all_ranks for part in mine):
        size = int(np.prod(part.shape))
        into = whole.setdefault(part.name, {key: np.full(size, np.nan, np.float32) for key in part.values})
        cover = covered.setdefault(part.name, np.zeros(size, np.int64))
        stop = part.start + part.values["master"].size
        cover[part.start : stop] += 1
        for key, values in part.values.items():
            into[key][part.start : stop] = values
        steps.add(part.step)
    assert all((cover == 1).all() for cover in covered.values()), "an element belongs to no rank, or to several"
    assert len(steps) == 1, steps
    return whole, steps.pop()


def same_bits(one: Whole, other: Whole) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name][key].view(np.uint32), other[name][key].view(np.uint32))
        for name in one
        for key in STATE_KEYS
    )


def largest_relative_deviation(one: Whole, other: Whole) -> float:
    """Of any element, in units of the largest element of its vector."""
    return max(
        float(np.abs(one[name][key] - other[name][key]).max() / np.abs(other[name][key]).max())
        for name in other
        for key in STATE_KEYS
    )


@dataclass(frozen=True)
class WholeSource:
    """A StateSource over whole parameters."""

    whole: Whole
    step: int

    def read(self, name: str, key: StateKey, start: int, stop: int) -> NDArray[np.float32]:
        values = self.whole[name][key][start:stop]
        assert values.size == stop - start
        values.setflags(write=False)  # as those from a memory map or a download
        return values

    def adam_step(self, name: str) -> int:
        return self.step


class Reference:
    """The same training in plain torch: one process, fp32, one unpacked sample after another."""

    def __init__(self, module: SummedLoss, optimizer: ResolvedOptimizer):
        self.module = module
        self._start(optimizer)

    def _start(self, optimizer: ResolvedOptimizer) -> None:
        matrices = [p for p in self.module.parameters() if p.dim() > 1]
        vectors = [p for p in self.module.parameters() if p.dim() == 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": vectors},
        ]
        self.adam = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps, weight_decay=0.0)
        self.max_grad_norm = optimizer.max_grad_norm

    def configure(self, optimizer: ResolvedOptimizer) -> None:
        state = {} if optimizer.state is OptimizerState.RESET else dict(self.adam.state)
        self._start(optimizer)
        self.adam.state.update(state)

    def step(self, samples: list[Sample], learning_rate: float = LEARNING_RATE) -> float:
        self.adam.zero_grad()
        self._backward(samples)
        norm = self._clip()
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        return norm

    def _backward(self, samples: list[Sample]) -> None:
        for sample in samples:
            loss: Tensor = self.module([sample]) / num_loss_tokens(samples)
            loss.backward()  # type: ignore[no-untyped-call]

    def _clip(self) -> float:
        """The norm before clipping, in float64: torch's own is off by 5e-6 for parameters of 100,000 elements."""
        gradients = [grad_of(parameter) for parameter in self.module.parameters()]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
        return norm

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        return {name: p.detach().numpy().ravel().copy() for name, p in self.module.model.named_parameters()}

    def gradient(self) -> dict[str, NDArray[np.float32]]:
        """As it was clipped."""
        return {name: grad_of(p).numpy().ravel().copy() for name, p in self.module.model.named_parameters()}


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def relative_error(values: Mapping[str, NDArray[Any]], truth: Mapping[str, NDArray[Any]]) -> float:
    """‖values − truth‖ / ‖truth‖ over all parameters together."""
    assert values.keys() == truth.keys()
    difference = sum(float(np.square(values[n].astype(np.float64) - truth[n]).sum()) for n in truth)
    return float((difference / sum(float(np.square(truth[n].astype(np.float64)).sum()) for n in truth)) ** 0.5)


def largest_error(values: Mapping[str, NDArray[Any]], truth: Mapping[str, NDArray[Any]]) -> float:
    assert values.keys() == truth.keys()
    return max(float(np.abs(values[name] - truth[name]).max()) for name in truth)
