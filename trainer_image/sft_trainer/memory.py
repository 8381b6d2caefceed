"""How much memory a rank needs, by ZeRO stage, from the model's numbers alone: arithmetic, not a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sft_trainer.model import ModelNumbers

RESERVE = 0.15
"""Share of the memory left alone: fragmentation, communication buffers, the CUDA context."""

LOSS_CHUNK_TOKENS = 1024
STAGES = (1, 2, 3)
MOST_RANKS = 1024
"""More are not thought of when it comes to what would fit."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one rank, by ZeRO stage."""

    by_stage: dict[int, int]

    def fits(self, stage: int, available: int) -> bool:
        return self.by_stage[stage] <= available * (1 - RESERVE)

    def lowest_that_fits(self, available: int) -> int | None:
        return next((stage for stage in STAGES if self.fits(stage, available)), None)


@dataclass(frozen=True)
class Footprint:
    """What decides how much memory a rank needs, and what it has."""

    numbers: ModelNumbers
    ranks: int
    tokens: int
    """`maxTokensPerGPU`: of a micro-batch."""
    fewest_tokens: int
    """`maxSequenceLength`: a micro-batch holds the longest sample."""
    bf16: bool
    checkpointing: bool
    available: int
    """Bytes on this rank."""

    @property
    def need(self) -> MemoryNeed:
        return memory_need(self.numbers, self.ranks, self.tokens, self.bf16, self.checkpointing)


def what_would_fit(asked: Footprint, stage: int | None) -> list[tuple[Footprint, int]]:
    """The least change of each kind that would fit, with its ZeRO stage: a higher stage, activation checkpointing, a
    smaller micro-batch, more ranks.

    `stage`: the one that ran out of memory, None where none is thought to fit. What it was thought to need was too
    much, whatever there is: less is proposed.
    """
    limit = asked.available if stage is None else min(asked.available, asked.need.by_stage[stage])
    allowed = [other for other in STAGES if stage is None or other >= stage]

    def first(candidates: Iterator[Footprint]) -> list[tuple[Footprint, int]]:
        fitting = ((one, other) for one in candidates for other in allowed if one.need.fits(other, limit))
        return list(next(([found] for found in fitting), []))

    def smaller() -> Iterator[Footprint]:
        tokens = asked.tokens
        while tokens > asked.fewest_tokens:
            tokens = max(tokens // 2, asked.fewest_tokens)
            yield replace(asked, tokens=tokens)

    def wider(one: Footprint) -> Iterator[Footprint]:
        ranks = 2 * one.ranks
        while ranks <= MOST_RANKS:
            yield replace(one, ranks=ranks)
            ranks *= 2

    with_checkpointing = [] if asked.checkpointing else [replace(asked, checkpointing=True)]
    ways = [*first(iter([asked])), *first(iter(with_checkpointing)), *first(smaller()), *first(wider(asked))]
    least = replace(asked, tokens=min(asked.tokens, asked.fewest_tokens), checkpointing=True)
    return ways or first(wider(least))


def advice(asked: Footprint, stage: int | None) -> str:
    """What to do for want of memory, in a sentence for the user."""
    there_is = f"there are {asked.available / 1e9:.1f} GB for each rank"
    ways = [in_words(asked, *found) for found in what_would_fit(asked, stage)]
    if not ways:
        return f"{there_is}, and nothing up to {MOST_RANKS} ranks would fit: it takes more memory, or a smaller model"
    return f"{there_is}; by arithmetic this would fit: {', or '.join(ways)}"


def in_words(asked: Footprint, found: Footprint, stage: int) -> str:
    changes = [f"spec.trainer.zeroStage {stage}"]
    if found.checkpointing != asked.checkpointing:
        changes.append("spec.trainer.activationCheckpointing true")
    if found.tokens != asked.tokens:
        changes.append(f"spec.batch.maxTokensPerGPU {found.tokens}")
    if found.ranks != asked.ranks:
        changes.append(f"{found.ranks} ranks")
    return " with ".join(reversed(changes))


def memory_need(
    numbers: ModelNumbers, ranks: int, micro_batch_tokens: int, bf16: bool, checkpointing: bool
) -> MemoryNeed:
    """Weights, gradients, masters, moments and activations of one rank.

    A parameter takes `w` bytes as a weight (2 in bf16, 4 in fp32) and again as a fresh gradient, 4 in the fp32
    accumulation, 12 as master and moments in fp32. ZeRO 1 shards the last, ZeRO 2 also the accumulation, ZeRO 3
    all of them. In fp32 the weights are their own gradients' precision and the accumulation is the gradient itself.
    """
    parameters, width = numbers.parameters, 2 if bf16 else 4
    accumulation = 4 if bf16 else 0
    activations = activation_bytes(numbers, micro_batch_tokens, width, checkpointing)
    layer = parameters // max(1, numbers.layers)
    states = {
        1: parameters * (2 * width + accumulation) + parameters * 12 // ranks,
        2: parameters * 2 * width + parameters * (accumulation + 12) // ranks,
        3: parameters * (2 * width + accumulation + 12) // ranks + 2 * layer * width + vocabulary_bytes(numbers, width),
    }
    return MemoryNeed({stage: states[stage] + activations for stage in STAGES})


def vocabulary_bytes(numbers: ModelNumbers, width: int) -> int:
    return numbers.vocabulary * numbers.hidden * width


def activation_bytes(numbers: ModelNumbers, tokens: int, width: int, checkpointing: bool) -> int:
    """Activations of one micro-batch: what each layer keeps, one layer at work, and a chunk of the logits in fp32."""
    at_work = 34 * tokens * numbers.hidden * width // 2
    kept = numbers.layers * (tokens * numbers.hidden * width if checkpointing else at_work)
    logits = 3 * min(tokens, LOSS_CHUNK_TOKENS) * numbers.vocabulary * 4
    return kept + at_work + logits
