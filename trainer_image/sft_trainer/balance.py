"""The load-balancing loss of models with experts, as if the whole optimizer step were one batch.

    loss = coefficient · E · Σ over experts of (mean number of a token's routes to it) · (mean probability of it)

Both means are over all tokens and layers of the step. A route is a choice and has no gradient; the probabilities have.
So once the routes of the step are counted, what is left is a weighted sum of probabilities, and that is additive over
tokens: it does not depend on how samples are packed or spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sft_trainer.attention import stock_attention
from sft_trainer.batches import Step
from sft_trainer.engine import Engine
from sft_trainer.ranks import Ranks

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class Balance:
    """What a model's config asks of its router."""

    coefficient: float
    experts: int
    routes: int
    """Experts that a token is sent to, in each layer."""

    def count_routes(self, router_logits: Sequence[Tensor], is_token: Tensor | None) -> Tensor:
        """float32 `[experts]`: how often each is chosen. router_logits: `[tokens, experts]` a layer.

        `is_token`: bool `[tokens]`, False where a row is padded; none where no row is.
        """
        chosen = torch.cat([kept(logits, is_token).topk(self.routes).indices.flatten() for logits in router_logits])
        return torch.bincount(chosen, minlength=self.experts).float()

    def weights(self, routes: Tensor) -> Tensor:
        """What a probability of each expert weighs in the loss, from the routes of all tokens and layers."""
        rows = routes.sum() / self.routes
        return self.coefficient * self.experts * routes / rows.square()

    def loss(self, router_logits: Sequence[Tensor], is_token: Tensor | None, weights: Tensor) -> Tensor:
        """The share of these tokens in the loss."""
        sums = [kept(logits, is_token).float().softmax(-1).sum(0) for logits in router_logits]
        return torch.stack(sums).sum(0) @ weights


def weigh_experts(engine: Engine, balance: Balance | None, ranks: Ranks, step: Step) -> dict[str, Tensor]:
    """What each micro-batch of the step must be told so that its loss has the balance loss; collective.

    Counts the routes of the whole step in a forward pass. Nothing, and nothing done, for a model without `balance`.
    """
    if balance is None:
        return {}
    routes = torch.zeros(balance.experts, dtype=torch.float64, device=ranks.device)
    with engine.evaluating():
        for micro_batch in step.mine:
            routes += engine(**micro_batch, counts_routes=True)[1]
    everyones = torch.from_numpy(ranks.gather(routes.tolist()).sum(axis=0))
    # The loss of a step is divided by its loss tokens, all of it.
    weights = balance.weights(everyones) * step.num_loss_tokens
    return {"expert_weights": weights.to(ranks.device, torch.float32)}


def kept(logits: Tensor, is_token: Tensor | None) -> Tensor:
    return logits if is_token is None else logits[is_token]


def find_balance(model: PreTrainedModel) -> tuple[Balance | None, list[str]]:
    """The balance loss that the config asks for, if it does, and what the owner of the run should know of it.

    As in transformers, it is asked for by `output_router_logits`. It is tried on a short sequence: only a loss that is
    the model's own is added.
    """
    config = model.config.get_text_config()
    coefficient = next((value for name in COEFFICIENTS if (value := getattr(config, name, 0))), 0.0)
    if not coefficient or not getattr(config, "output_router_logits", False):
        return None, []
    asked = f"the config asks for a router auxiliary loss (coefficient {coefficient})"
    balance, error = _tried(model, coefficient)
    if balance is None:
        return None, [f"{asked}: it is not added, for {error}; the loss is the cross-entropy alone"]
    how = "its routes are counted first, in one more forward pass of each step; the reported loss is without it"
    return balance, [f"{asked}: it is added as of the whole step. {how[0].upper()}{how[1:]}"]


def _tried(model: PreTrainedModel, coefficient: float) -> tuple[Balance | None, str]:
    ids = torch.arange(1, 25, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), stock_attention(model):
            output: Any = model(input_ids=ids, use_cache=False, output_router_logits=True)
    finally:
        model.train(was_training)
    own, router_logits = getattr(output, "aux_loss", None), getattr(output, "router_logits", None)
    if not isinstance(own, Tensor) or not router_logits:
        return None, "the model does not give its router's logits and its own loss"
    routes = getattr(model.config.get_text_config(), "num_experts_per_tok", 0)
    balance = Balance(coefficient, router_logits[0].shape[-1], routes)
    ours = balance.loss(router_logits, None, balance.weights(balance.count_routes(router_logits, None)))
    error = abs(float(ours / (coefficient * own)) - 1)
    # In bf16 the model's own is made of rounded probabilities.
    if not error <= (1e-5 if router_logits[0].dtype == model.dtype == torch.float32 else 2e-2):
        return None, f"the model's own differs from the one we know by {error:.1e}"
    return balance, ""
