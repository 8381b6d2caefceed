"""How much memory a rank needs, by ZeRO stage, from the model's numbers alone: arithmetic, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from sft_trainer.model import ModelNumbers

RESERVE = 0.15
"""Share of the memory left alone: fragmentation, communication buffers, the CUDA context."""

LOSS_CHUNK_TOKENS = 1024
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one rank, by ZeRO stage."""

    by_stage: dict[int, int]

    def fits(self, stage: int, available: int) -> bool:
        return self.by_stage[stage] <= available * (1 - RESERVE)

    def lowest_that_fits(self, available: int) -> int | None:
        return next((stage for stage in STAGES if self.fits(stage, available)), None)


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
