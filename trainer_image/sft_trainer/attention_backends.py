"""Attention functions for packed micro-batches, registered with transformers by name.

A packed micro-batch is one row of tokens, `[1, T]`, in which samples lie side by side. A backend is told where they
begin by `cu_seq_lens_q` and `cu_seq_lens_k` (int32 `[samples + 1]`), `max_length_q` and `max_length_k` (ints) and
`sample_lengths` (a list, so that nobody has to ask the device).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention import varlen as _torch_varlen
except ImportError:  # torch before 2.10
    varlen_attn = None
else:
    varlen_attn = _torch_varlen.varlen_attn


def register_backends() -> None:
    """Makes our backends known to transformers by name. Doing it twice is the same as doing it once."""
    AttentionInterface.register("sample_sdpa", sample_sdpa)
    AttentionInterface.register("sample_softcap", sample_softcap)
    AttentionInterface.register("varlen", varlen)
    AttentionInterface.register("masked_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("masked_sdpa", sdpa_mask)
    for name in ("sample_sdpa", "sample_softcap", "varlen"):
        AttentionMaskInterface.register(name, _no_mask)


def packed_arguments(cu_seq_lens: Tensor, max_length: int, lengths: Sequence[int]) -> dict[str, Any]:
    """What tells any packed backend where samples begin: keyword arguments for a model's forward."""
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max_length,
        "max_length_k": max_length,
        "sample_lengths": list(lengths),
        "attention_mask": None,
        # With a cache the stock masks let packed samples see each other.
        "use_cache": False,
    }


def sample_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sample_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One causal scaled-dot-product attention per sample: cost grows with Σ l², not T², and no mask is built.

    query `[1, heads, T, head_dim]`, key and value with as many heads or fewer -> `[1, T, heads, head_dim]`.
    """
    _refuse(kwargs, "softcap", "s_aux", "position_bias", "cache")
    return _each_sample(
        query, key, value, sample_lengths, lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=(window := _window_mask(q, sliding_window)),
            is_causal=window is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        ),
    )  # fmt: skip


def sample_softcap(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sample_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sample_sdpa` for models that cap their attention scores (Gemma 2), which fused kernels of torch cannot."""
    _refuse(kwargs, "s_aux", "position_bias", "cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        visible = _window_mask(q, sliding_window)
        if visible is None:
            visible = q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, p=dropout) @ v

    return _each_sample(query, key, value, sample_lengths, attend)


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's own variable-length attention: one kernel for all samples, on CUDA in bf16 or fp16.

    Its signature has changed between torch versions: before 2.15 it knows no grouped heads, and they are repeated.
    """
    _refuse(kwargs, "softcap", "s_aux", "position_bias", "cache")
    if varlen_attn is None or cu_seq_lens_q is None or max_length_q is None or dropout:
        raise ValueError("varlen attention takes packed samples, without attention dropout, on torch 2.10 or later")
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in _VARLEN_PARAMETERS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # The same tensor for queries and keys: cuDNN's causal mask is only right if it can see that they are one.
    out: Tensor = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        window_size=(sliding_window - 1 if sliding_window else -1, 0), **options,
    )  # fmt: skip
    return out.unsqueeze(0), None


_VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _refuse(kwargs: dict[str, Any], *names: str) -> None:
    for name in names:
        if kwargs.get(name) is not None:
            raise ValueError(f"this backend does not know {name}")


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Bool `[l, l]`, True where a query sees a key, if the sample is longer than the sliding window."""
    length = query.shape[2]
    if not window or length <= window:
        return None
    i = torch.arange(length, device=query.device)
    distance = i[:, None] - i
    return (distance >= 0) & (distance < window)


def _each_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int] | None,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, None]:
    # Without lengths the rows would be one long sample: better no logits than those.
    if lengths is None:
        raise ValueError("this backend needs packed samples (sample_lengths); use stock_attention to generate text")
    parts = [torch.split(x, list(lengths), dim=2) for x in (query, key, value)]
    return torch.cat([attend(q, k, v) for q, k, v in zip(*parts, strict=True)], dim=2).transpose(1, 2), None
