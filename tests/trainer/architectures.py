"""Tiny models, from configs, of the architectures that the trainer is asked to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

VOCABULARY = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

PACKABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "mixtral": {**_MOE},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5},
    "granitemoe": {**_MOE, "logits_scaling": 4.0},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_MOE, "head_dim": 24},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "phi": {"tie_word_embeddings": False},
    "phi3": {"sliding_window": 16},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "smollm3": {},
    "starcoder2": {"sliding_window": 16},
    "cohere2": {"sliding_window": 16, "logit_scale": 0.25},
    "gpt_neox": {},
    "gpt2": {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "stablelm": {},
    "llama4_text": {"head_dim": 16, "num_local_experts": 2, "attention_chunk_size": 16, "intermediate_size_mlp": 96},
}
"""Architectures whose samples can be packed. (OPT could not before transformers heeded its explicit positions.)"""

UNPACKABLE: dict[str, dict[str, Any]] = {
    "falcon": {"alibi": False},
    "bloom": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "gpt_oss": {"head_dim": 16, **_MOE},
}
"""Attention or recurrence of their own, through which packed samples see each other: padded only."""


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, gain: float = 3.0, **changes: Any
) -> PreTrainedModel:
    """A model whose weights are large enough, by `gain`, for its logits to depend on every token it sees."""
    known = {**PACKABLE, **UNPACKABLE}[architecture]
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**_COMMON, **known, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
            parameter.data = parameter.data.to(dtype)
    return model


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each: labels are shifted, and about a third of the tokens bears loss."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[torch.rand(length, generator=generator) > 0.35] = -100
        samples.append((ids, labels))
    return samples


def packed(samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """A packed micro-batch, as `PackedLM.forward` takes it."""
    lengths = [len(ids) for ids, _ in samples]
    return {
        "input_ids": torch.cat([ids for ids, _ in samples])[None],
        "labels": torch.cat([labels for _, labels in samples])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_length": max(lengths),
        "lengths": lengths,
    }


def padded(samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """A padded micro-batch, as `PackedLM.forward` takes it."""

    def rows(tensors: list[Tensor], fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)

    return {
        "input_ids": rows([ids for ids, _ in samples], 0),
        "labels": rows([labels for _, labels in samples], -100),
        "attention_mask": rows([torch.ones_like(ids) for ids, _ in samples], 0),
    }
