"""The fused loss against the plain one: all logits at once, in fp64 or fp32, of samples that are not packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sft_trainer.attention import choose_attention, stock_attention
from sft_trainer.loss import LogitsForm, PackedLM, fused_cross_entropy, verify_head
from tests.gang import Gangs
from tests.trainer.architectures import PACKABLE, UNPACKABLE, packed, padded, random_samples, tiny_model
from tests.trainer.engine_cases import assemble, relative_error
from tests.trainer.loss_cases import LENGTHS, peak_bytes, step_under_zero

FORMS = [LogitsForm(), LogitsForm(scale=1 / 8), LogitsForm(scale=2.0, softcap=5.0)]
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(dtype: torch.dtype, rows: int = 100, hidden: int = 64, vocabulary: int = 500) -> Problem:
    generator = torch.Generator().manual_seed(0)
    h, w, b = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, hidden), (vocabulary, hidden), (vocabulary,))
    )
    return h, w, b, torch.randint(vocabulary, (rows,), generator=generator)


def plain(h: Tensor, w: Tensor, b: Tensor, y: Tensor, form: LogitsForm) -> Tensor:
    logits = (h @ w.t() + b).mul(form.scale)
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    return F.cross_entropy(logits.float() if h.dtype == torch.bfloat16 else logits, y, reduction="sum")


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss * 0.37, tensors)]


def error(values: Tensor, truth: Tensor) -> float:
    return float((values - truth).norm() / truth.norm())


@pytest.mark.parametrize("form", FORMS, ids=["plain", "scaled", "soft-capped"])
@pytest.mark.parametrize("chunk_rows", [1, 32, 1000])
def test_loss_and_gradients_are_those_of_full_logits(form: LogitsForm, chunk_rows: int) -> None:
    h, w, b, y = problem(torch.float32)
    loss, _ = fused_cross_entropy(h, w, b, y, form=form, chunk_rows=chunk_rows)
    exact = [x.detach().double().requires_grad_() for x in (h, w, b)]
    truth = plain(*exact, y, form)  # type: ignore[call-arg, misc]
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=2e-7)
    for mine, true in zip(gradients(loss, h, w, b), gradients(truth, *exact), strict=True):
        assert error(mine, true) < 2e-6


@pytest.mark.parametrize("form", FORMS, ids=["plain", "scaled", "soft-capped"])
def test_in_bf16_the_gradients_are_as_close_to_exact_as_those_of_full_logits(form: LogitsForm) -> None:
    h, w, b, y = problem(torch.bfloat16, rows=600)
    w.data.mul_(0.1)
    loss, _ = fused_cross_entropy(h, w, b, y, form=form, chunk_rows=64)
    exact = [x.detach().double().requires_grad_() for x in (h, w, b)]
    true = gradients(plain(*exact, y, form), *exact)  # type: ignore[call-arg, misc]
    ours = [error(*pair) for pair in zip(gradients(loss, h, w, b), true, strict=True)]
    full = [error(*pair) for pair in zip(gradients(plain(h, w, b, y, form), h, w, b), true, strict=True)]
    assert max(ours) < 3e-3
    assert all(mine < 1.5 * theirs for mine, theirs in zip(ours, full, strict=True)), (ours, full)


def test_a_factor_on_the_loss_does_not_bias_a_bf16_gradient() -> None:
    h, w, b, y = problem(torch.bfloat16)
    loss, _ = fused_cross_entropy(h, w, b, y, chunk_rows=32)
    (one,) = torch.autograd.grad(loss, h)
    loss, _ = fused_cross_entropy(h, w, b, y, chunk_rows=32)
    (scaled,) = torch.autograd.grad(loss * 1.0019, h)  # in bf16 that factor is 1
    ratio = float((scaled.double() * one.double()).sum() / one.double().square().sum())
    assert ratio == pytest.approx(1.0019, abs=2e-4)


def test_the_checkpointed_form_gives_the_same_gradients() -> None:
    def chunk(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b).float(), y, reduction="sum")

    h, w, b, y = problem(torch.float32)
    oracle = sum(
        (checkpoint(chunk, h[i : i + 32], w, b, y[i : i + 32], use_reentrant=False) for i in range(0, 100, 32)),
        torch.zeros(()),
    )
    loss, _ = fused_cross_entropy(h, w, b, y, chunk_rows=32)
    assert torch.equal(loss.detach(), oracle.detach())
    for mine, true in zip(gradients(loss, h, w, b), gradients(oracle, h, w, b), strict=True):
        assert error(mine, true) < 1e-6


def test_hits_are_counted_when_asked_for_and_only_then() -> None:
    h, w, b, y = problem(torch.float32)
    y[:40] = (h @ w.t() + b)[:40].argmax(1)
    expected = int(((h @ w.t() + b).argmax(1) == y).sum())
    assert int(fused_cross_entropy(h, w, b, y, chunk_rows=32, count_hits=True)[1]) == expected >= 40
    assert int(fused_cross_entropy(h, w, b, y, chunk_rows=32)[1]) == 0
    with torch.no_grad():
        loss, hits = fused_cross_entropy(h, w, b, y, chunk_rows=32, count_hits=True)
    assert int(hits) == expected
    assert not loss.requires_grad


def test_gradients_that_nobody_wants_are_not_made() -> None:
    h, w, b, y = problem(torch.float32)
    frozen = w.detach()
    loss, _ = fused_cross_entropy(h, frozen, b, y, chunk_rows=32)
    mine = gradients(loss, h, b)
    for ours, true in zip(mine, gradients(plain(h, frozen, b, y, LogitsForm()), h, b), strict=True):
        assert error(ours, true) < 2e-6


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest tensor it makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    h, w, b, y = problem(torch.float32, rows=400, hidden=16, vocabulary=300)
    with LargestTensor() as largest:
        fused_cross_entropy(h, w, b, y, chunk_rows=20)[0].backward()
    assert largest.elements <= max(20 * 300, 400 * 16) < 400 * 300


def test_the_peak_of_memory_is_far_below_full_logits(gang: Gangs) -> None:
    rows, hidden, vocabulary = 4096, 32, 32_000
    logits = rows * vocabulary * 4
    (fused,) = gang(1).run(peak_bytes, True, rows, hidden, vocabulary)
    (full,) = gang(1).run(peak_bytes, False, rows, hidden, vocabulary)
    assert fused < 0.6 * logits < 1.8 * logits < full


# ------------------------------------------------------------------------------------------------- PackedLM


def separate_loss(model: PreTrainedModel, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ over samples, one by one, from the model's own logits."""
    losses = [
        F.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0].float(), labels, reduction="sum")
        for ids, labels in samples
        if (labels != -100).any()
    ]
    return torch.stack(losses).sum()


def compare(module: PackedLM, model: PreTrainedModel, batch: dict[str, Any], samples: Any) -> tuple[float, float]:
    """Relative errors of the loss and of its gradient against `separate_loss`."""
    parameters = dict(model.named_parameters())
    loss, _ = module(**batch)
    mine = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    with stock_attention(model):
        truth = separate_loss(model, samples)
    true = torch.autograd.grad(truth, list(parameters.values()), allow_unused=True)
    pairs = [(a, b) for a, b in zip(mine, true, strict=True) if b is not None]
    assert all(a is not None for a, _ in pairs)
    distance = sum(float((a - b).double().square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return abs(float(loss.detach() / truth.detach()) - 1), (distance / size) ** 0.5


@pytest.mark.parametrize("architecture", PACKABLE)
def test_the_loss_of_a_packed_batch_is_that_of_its_samples(architecture: str) -> None:
    model = tiny_model(architecture).train()
    choose_attention(model, None, "cpu")
    module = PackedLM(model)
    samples = random_samples(LENGTHS)
    loss_error, gradient_error = compare(module, model, packed(samples), samples)
    assert loss_error < 5e-7
    assert gradient_error < 2e-6
    is_whole = architecture == "llama4_text"  # a language model and its decoder are one module there
    assert (module.head is None) == is_whole, module.head_reason
    assert [notice[:25] for notice in module.notices] == (["the model's whole logits "] if is_whole else [])


@pytest.mark.parametrize("architecture", [*UNPACKABLE, "llama", "gemma2", "opt"])
def test_the_loss_of_a_padded_batch_is_that_of_its_samples(architecture: str) -> None:
    model = tiny_model(architecture).train()
    samples = random_samples(LENGTHS)
    loss_error, gradient_error = compare(PackedLM(model), model, padded(samples), samples)
    assert loss_error < 5e-7
    assert gradient_error < 5e-6


def test_hits_are_counted_in_eval_mode_only() -> None:
    model = tiny_model("llama")
    choose_attention(model, None, "cpu")
    module = PackedLM(model)
    samples = random_samples(LENGTHS)
    with stock_attention(model), torch.no_grad():
        expected = sum(int((model(ids[None]).logits[0].argmax(-1) == labels).sum()) for ids, labels in samples)
    whole = PackedLM(model)
    whole.head = None
    for each in (module, whole):
        with torch.no_grad():
            assert int(each.eval()(**packed(samples))[1]) == expected
        assert int(each.train()(**packed(samples))[1]) == 0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "whole-logits"])
def test_a_batch_without_targets_has_loss_zero_and_touches_every_parameter(fused: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    choose_attention(model, None, "cpu")
    module = PackedLM(model)
    module.head = module.head if fused else None
    ids, labels = random_samples([5])[0]
    loss, hits = module(**packed([(ids, torch.full_like(labels, -100))]))
    loss.backward()
    assert float(loss.detach()) == int(hits) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_head_that_does_more_than_its_config_says_is_found_out_and_the_loss_stays_right() -> None:
    model = tiny_model("cohere2").train()
    model.logit_scale = 0.7  # the model's own forward uses this, the config says 0.25
    choose_attention(model, None, "cpu")
    form, reason = verify_head(model)
    assert form is None
    assert "whole logits are kept" in reason
    module = PackedLM(model)
    assert module.notices == [reason]
    samples = random_samples(LENGTHS)
    assert max(compare(module, model, packed(samples), samples)) < 2e-6


BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
ASKED = "the config asks for a router auxiliary loss (coefficient 0.02): it is "


def test_a_balance_loss_that_is_asked_for_is_added_and_said() -> None:
    module = PackedLM(tiny_model("mixtral", **BALANCED))
    assert module.notices == [
        f"{ASKED}added as of the whole step. Its routes are counted first, in one more forward pass of each step; the "
        "reported loss is without it"
    ]
    not_asked = PackedLM(tiny_model("mixtral", router_aux_loss_coef=0.02))
    assert (not_asked.balance, not_asked.notices) == (None, [])


def test_a_balance_loss_of_the_models_own_is_left_out_and_that_is_said() -> None:
    sends_elsewhere = tiny_model("mixtral", **BALANCED)
    sends_elsewhere.num_experts_per_tok = 1  # the model's own loss uses this, the config says 2
    for model, why in [
        (sends_elsewhere, "the model's own differs from the one we know by "),
        (tiny_model("llama4_text", **BALANCED), "the model does not give its router's logits and its own loss"),
    ]:
        module = PackedLM(model)
        assert module.balance is None
        assert module.notices[-1].startswith(f"{ASKED}not added, for {why}")
        assert module.notices[-1].endswith("; the loss is the cross-entropy alone")


def test_a_scored_loss_is_without_the_balance_loss() -> None:
    model = tiny_model("mixtral", **BALANCED).eval()
    choose_attention(model, None, "cpu")
    samples = random_samples(LENGTHS)
    loss, _ = PackedLM(model)(**packed(samples))
    with stock_attention(model):
        assert float(loss.detach()) == pytest.approx(float(separate_loss(model, samples).detach()), rel=5e-7)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_zero_the_gradient_of_a_tied_head_is_that_of_the_samples_one_by_one(gang: Gangs, stage: int) -> None:
    answers = gang(2).run(step_under_zero, stage)
    whole, _ = assemble([part for part, *_ in answers])
    gradient = {name: values["exp_avg"] / 0.1 for name, values in whole.items()}

    model = tiny_model("llama", tie_word_embeddings=True)
    samples = random_samples(LENGTHS)
    loss = separate_loss(model, samples)
    num_targets = sum(int((labels != -100).sum()) for _, labels in samples)
    (loss / num_targets).backward()
    truth = {n: p.grad.flatten().numpy() for n, p in model.named_parameters() if p.grad is not None}
    assert relative_error(gradient, truth) < 1e-6
    assert sum(total for _, _, total, _ in answers) == pytest.approx(float(loss.detach()), rel=1e-6)
    expected = sum(int((model(ids[None]).logits[0].argmax(-1) == labels).sum()) for ids, labels in samples)
    assert sum(hits for *_, hits in answers) == expected
