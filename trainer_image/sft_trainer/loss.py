"""The exact loss: a sum of cross-entropies over the tokens that bear loss, without ever holding all logits.

    loss = Σ −log softmax(form(W h))[target]          over the rows of h that have a target, in fp32

`FusedCrossEntropy` walks the rows in chunks and computes both gradients while a chunk's probabilities are at hand, so
the backward pass only scales them. What is held at a time is one chunk × vocabulary in fp32, and W's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_trainer.attention import stock_attention
from sft_trainer.attention_backends import packed_arguments
from sft_trainer.balance import find_balance

IGNORED = -100
"""The label of a token that bears no loss."""

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits in a chunk: 64 MiB of fp32 on the CPU, 512 MiB on a GPU, whose kernels want more rows at a time."""


@dataclass(frozen=True)
class LogitsForm:
    """How a model's logits come from `W h + b`: times `scale`, then capped to ±`softcap` by tanh."""

    scale: float = 1.0
    softcap: float | None = None


# ----------------------------------------------------------------------------------- fused cross-entropy


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    form: LogitsForm = LogitsForm(),
    chunk_rows: int | None = None,
    count_hits: bool = False,
) -> tuple[Tensor, Tensor]:
    """(Σ cross-entropy in fp32, number of targets ranked first).

    hidden `[n, d]`, weight `[vocabulary, d]`, bias `[vocabulary]` or none, targets int64 `[n]`, each a token id. The
    second value is 0 unless `count_hits`. Differentiable once in hidden, weight and bias; n may be 0.
    """
    if chunk_rows is None:
        chunk_rows = max(16, _CHUNK_ELEMENTS.get(hidden.device.type, 2**27) // weight.shape[0])
    if torch.is_grad_enabled():
        result: tuple[Tensor, Tensor] = FusedCrossEntropy.apply(
            hidden, weight, bias, targets, form, chunk_rows, count_hits
        )
        return result
    loss, hits, *_ = _walk_chunks(hidden, weight, bias, targets, form, chunk_rows, count_hits, (False,) * 3)
    return loss, hits


class FusedCrossEntropy(torch.autograd.Function):
    """`fused_cross_entropy` with its gradients, computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        form: LogitsForm,
        chunk_rows: int,
        count_hits: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = tuple(ctx.needs_input_grad[:3])
        loss, hits, *gradients = _walk_chunks(hidden, weight, bias, targets, form, chunk_rows, count_hits, wanted)
        ctx.gradients = gradients
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "a fused cross-entropy can be differentiated once"
        (hidden, weight, bias), ctx.gradients = ctx.gradients, None
        # In fp32 until now: a factor on bf16 numbers would round them a second time, and near 1 always back.
        hidden, weight, bias = (
            None if gradient is None else gradient.mul_(upstream[0]).to(dtype)
            for gradient, dtype in zip((hidden, weight, bias), ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None, None, None


def _walk_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    form: LogitsForm,
    chunk_rows: int,
    count_hits: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, hits, and in fp32 the gradients that are wanted, of hidden, weight and bias."""
    loss = hidden.new_zeros((), dtype=torch.float64)
    hits = targets.new_zeros(())
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
    # The CPU multiplies into fp32 from fp32 only: converted once, not chunk by chunk.
    factor = weight if weight.is_cuda or not wanted[0] else weight.float()
    for start in range(0, len(hidden), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = F.linear(hidden[rows], weight, bias).float()
        chunk_loss, chunk_hits, slope = _score(logits, targets[rows], form, count_hits, any(wanted))
        loss += chunk_loss
        hits += chunk_hits
        if slope is None:
            continue
        if grad_bias is not None:
            grad_bias += slope.sum(0)
        slope = slope.to(hidden.dtype)
        if grad_hidden is not None:
            _add_product_(grad_hidden[rows], slope, factor)
        if grad_weight is not None:
            _add_product_(grad_weight, slope.t(), hidden[rows])
    return loss.float(), hits, grad_hidden, grad_weight, grad_bias


def _score(
    logits: Tensor, targets: Tensor, form: LogitsForm, count_hits: bool, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, hits and, in the memory of `logits` (fp32 `[rows, vocabulary]`, overwritten), d loss / d (W h + b)."""
    targets = targets[:, None]
    logits.mul_(form.scale)
    capped_slope = None
    if form.softcap is not None:
        logits.div_(form.softcap).tanh_()
        capped_slope = 1 - logits.square() if with_slope else None
        logits.mul_(form.softcap)
    hits = targets.new_zeros(())
    if count_hits:
        top, first = logits.max(1, keepdim=True)
        hits = (first == targets).sum()
    else:
        top = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, targets)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    loss = (total.log() + top - chosen).sum(dtype=torch.float64)
    if not with_slope:
        return loss, hits, None
    slope = logits.div_(total).scatter_add_(1, targets, targets.new_full((), -1, dtype=logits.dtype).expand_as(targets))
    if capped_slope is not None:
        slope.mul_(capped_slope)
    return loss, hits, slope.mul_(form.scale)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in fp32, whatever the type of the factors."""
    if not left.is_cuda or left.dtype == torch.float32:
        total.addmm_(left.float(), right.float())
    elif _multiplies_into_fp32(left.dtype, left.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(left @ right)


@lru_cache(maxsize=8)
def _multiplies_into_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch can add a half-precision product to an fp32 matrix without rounding it first."""
    # 1 + 2⁻¹³ fits in fp32 and in neither bf16 nor fp16: a sum rounded on the way loses its second term.
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    nearly = torch.zeros_like(ones)
    nearly[:, 0], nearly[:, 1] = 1, 2.0**-13
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, nearly, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 1 + 2.0**-13).all())


# ------------------------------------------------------------------------------------------------- model


class LossHead(nn.Module):
    """The model's output matrix as a module of its own: ZeRO-3 gathers the weight once for a whole micro-batch.

    It holds the very parameters of the model's `lm_head` (or of its tied embedding), which thereby keep their names.
    """

    def __init__(self, head: nn.Linear, form: LogitsForm):
        super().__init__()
        self.weight = head.weight
        self.bias: nn.Parameter | None = getattr(head, "bias", None)
        self.form = form

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return fused_cross_entropy(
            hidden, self.weight, self.bias, targets, form=self.form, count_hits=not self.training
        )


class PackedLM(nn.Module):
    """A causal language model that answers a micro-batch with its loss.

    `model` is the model; a parameter's name here is `model.` and its name there. `balance` is the balance loss that it
    asks for, if it does. `notices` says in sentences what the owner of the run should know about how the loss is
    computed.
    """

    def __init__(self, model: PreTrainedModel):
        """`model` is a PreTrainedModel with whole weights on its device: its head is tried on a short sequence."""
        super().__init__()
        self.model = model
        form, self.head_reason = verify_head(model)
        self.head = LossHead(model.get_output_embeddings(), form) if form else None
        self.balance, notices = find_balance(model)
        self.notices = [*([] if form else [self.head_reason]), *notices]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        max_length: int | None = None,
        lengths: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        expert_weights: Tensor | None = None,
        counts_routes: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(Σ cross-entropy over the targets in fp32, number of targets ranked first; 0 in training mode).

        Packed: input_ids, position_ids and labels `[1, T]`, cu_seq_lens int32 `[samples + 1]`, max_length, lengths.
        Padded on the right: input_ids, labels and attention_mask `[n, L]`. Labels are shifted already, −100 for none.
        Without a target the loss is 0 and still touches every trainable parameter; such a micro-batch is a dummy.

        For a model with `balance`: with `expert_weights` `[experts]` the first value also has the gradient of Σ weight
        · probability over tokens and layers; its value stays the cross-entropy. With `counts_routes` the answer is
        (0, how many routes of the micro-batch's tokens go to each expert).
        """
        arguments = self._packed_or_padded(position_ids, cu_seq_lens, max_length, lengths, attention_mask)
        flat = labels.reshape(-1)
        rows = (flat != IGNORED).nonzero().squeeze(1)
        targets = flat[rows]
        if expert_weights is not None or counts_routes:
            arguments["output_router_logits"] = True
        if self.head is None:
            output = self.model(input_ids=input_ids, **arguments)
        else:
            output = self.model.base_model(input_ids=input_ids, **arguments)
        if counts_routes:
            return flat.new_zeros((), dtype=torch.float32), self._routes(output.router_logits, attention_mask, targets)
        if self.head is None:
            loss, hits = _whole_logits_loss(output.logits.flatten(0, 1)[rows], targets, count_hits=not self.training)
        else:
            loss, hits = self.head(output.last_hidden_state.flatten(0, 1)[rows], targets)
        if expert_weights is not None:
            assert self.balance is not None
            # A dummy has no share in it but the same graph: ZeRO 3 hangs where ranks differ in the order of modules.
            weights = expert_weights if len(targets) else torch.zeros_like(expert_weights)
            extra = self.balance.loss(output.router_logits, _is_token(attention_mask), weights)
            loss = loss + (extra - extra.detach())
        return loss, hits

    def _routes(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, targets: Tensor) -> Tensor:
        assert self.balance is not None
        routes = self.balance.count_routes(router_logits, _is_token(attention_mask))
        return routes if len(targets) else torch.zeros_like(routes)

    @staticmethod
    def _packed_or_padded(
        position_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
        max_length: int | None,
        lengths: Sequence[int] | None,
        attention_mask: Tensor | None,
    ) -> dict[str, Any]:
        if cu_seq_lens is None:
            # Positions count from 0 in every row, as every model does by itself; some read explicit ones otherwise.
            return {"attention_mask": attention_mask, "use_cache": False}
        assert attention_mask is None, "a mask would switch packing off"
        lengths = cu_seq_lens.diff().tolist() if lengths is None else lengths
        return {
            "position_ids": position_ids,
            **packed_arguments(cu_seq_lens, max(lengths) if max_length is None else max_length, lengths),
        }


def _is_token(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.flatten().bool()


def _whole_logits_loss(logits: Tensor, targets: Tensor, count_hits: bool) -> tuple[Tensor, Tensor]:
    hits = (logits.argmax(-1) == targets).sum() if count_hits else targets.new_zeros(())
    return F.cross_entropy(logits.float(), targets, reduction="sum"), hits


def verify_head(model: PreTrainedModel) -> tuple[LogitsForm | None, str]:
    """How this model makes logits of its last hidden state, tried on a short sequence; none where we cannot tell.

    Returns the form and why: the fused loss is only used where it gives the model's own logits.
    """
    head = model.get_output_embeddings()
    if model.base_model is model or not isinstance(getattr(head, "weight", None), nn.Parameter):
        return None, _whole("it does not keep a decoder and an output matrix apart")
    form = _form_from_config(model.config)
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 13, device=head.weight.device)[None] % head.weight.shape[0]
    try:
        with torch.no_grad(), stock_attention(model):
            expected = model(input_ids=ids, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = F.linear(hidden, head.weight, getattr(head, "bias", None)).float() * form.scale
    finally:
        model.train(was_training)
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    if logits.shape != expected.shape:
        return None, _whole("its output matrix does not fit its hidden state")
    error = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= (1e-5 if head.weight.dtype == torch.float32 else 2e-2):
        return None, _whole(f"they differ by {error:.1e} from its output matrix times its last hidden state")
    return form, f"fused cross-entropy: it gives the model's own logits (difference {error:.1e})"


def _form_from_config(config: Any) -> LogitsForm:
    text = config.get_text_config()
    divisor = getattr(text, "logits_scaling", None) or 1.0  # Granite
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
    return LogitsForm(scale / divisor, getattr(text, "final_logit_softcapping", None))  # Gemma


def _whole(why: str) -> str:
    return f"the model's whole logits are kept for the loss, which costs memory: {why}"
