"""Packed samples must not see each other, on any architecture, or the model must not be packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sft_api.run import ExitCode, RunError
from sft_api.spec import Attention
from sft_trainer.attention import choose_attention, padded_attention, self_test, stock_attention
from sft_trainer.attention_backends import packed_arguments, register_backends, sample_sdpa, varlen
from tests.trainer.architectures import PACKABLE, UNPACKABLE, packed, random_samples, tiny_model

LENGTHS = (9, 41, 30, 1)


def packed_logits(model: PreTrainedModel, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    batch = packed(samples)
    arguments = packed_arguments(batch["cu_seq_lens"], batch["max_length"], batch["lengths"])
    output = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **arguments)
    logits: Tensor = output.logits[0]
    return logits


def separate_logits(model: PreTrainedModel, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    with stock_attention(model):
        return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in samples])


@pytest.mark.parametrize("architecture", PACKABLE)
def test_packed_logits_are_those_of_each_sample_alone(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    choice = choose_attention(model, None, "cpu")
    assert choice.keeps_samples_apart, choice.reason
    assert choice.backend in ("sample_sdpa", "sample_softcap", "masked_sdpa")
    samples = random_samples(LENGTHS)
    with torch.no_grad():
        together, alone = packed_logits(model, samples), separate_logits(model, samples)
    assert float((together - alone).abs().max() / alone.abs().max()) < 2e-6


@pytest.mark.parametrize("architecture", UNPACKABLE)
def test_a_model_that_mixes_packed_samples_is_caught_and_left_with_its_own_attention(architecture: str) -> None:
    model = tiny_model(architecture)
    before = model.config._attn_implementation
    choice = choose_attention(model, None, "cpu")
    assert not choice.keeps_samples_apart
    assert choice.reason.startswith("no backend keeps packed samples apart (")
    assert choice.backend == model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ["llama", "mistral", "granite", "gemma2", "qwen3", "olmo2", "phi3"])
def test_the_self_test_passes_in_bf16(architecture: str) -> None:
    choice = choose_attention(tiny_model(architecture, torch.bfloat16), None, "cpu")
    assert choice.keeps_samples_apart, choice.reason


def test_most_models_take_one_attention_per_sample_without_any_mask() -> None:
    choice = choose_attention(tiny_model("llama"), None, "cpu")
    assert choice.backend == "sample_sdpa"
    assert choice.reason.startswith("the fastest that passes the self-test (packed logits differ by ")
    assert choice.reason.endswith("leak 0.0e+00)")


def one_long_sample(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What a backend does that knows nothing of packing."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"], enable_gqa=True)
    return out.transpose(1, 2), None


def without_window(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    return sample_sdpa(*args, **kwargs)


def leaks_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Right going forward; going backward every token takes a little of every other's gradient."""
    out, _ = sample_sdpa(*args, **kwargs)
    return out + 1e-3 * (out.sum(1, keepdim=True) - out.sum(1, keepdim=True).detach()), None


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        pytest.param(one_long_sample, "packed logits differ by", id="ignores-packing"),
        pytest.param(without_window, "packed logits differ by", id="ignores-the-sliding-window"),
        pytest.param(leaks_backward, "samples see each other", id="mixes-gradients"),
    ],
)
def test_a_broken_backend_fails_the_self_test(backend: Any, why: str) -> None:
    AttentionInterface.register("broken", backend)
    AttentionMaskInterface.register("broken", lambda *args, **kwargs: None)
    model = tiny_model("mistral", sliding_window=256)  # longer than the samples of the test
    model.set_attn_implementation("broken")
    result = self_test(model, "cpu")
    assert not result.passed
    assert why in result.detail


def forgets_boundaries(backend: str) -> Any:
    """What `backend` would do if all packed samples were one."""
    works = AttentionInterface()[backend]

    def attend(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out, _ = works(module, query, *args, **{**kwargs, "sample_lengths": [query.shape[2]]})
        return out, None

    return attend


@pytest.mark.parametrize("architecture", PACKABLE)
def test_a_backend_that_forgets_where_samples_begin_is_caught_on_every_architecture(architecture: str) -> None:
    model = tiny_model(architecture)
    backend = choose_attention(model, None, "cpu").backend
    AttentionInterface.register("forgetful", forgets_boundaries(backend))
    # Where the backend takes a mask, it is without one, and causal.
    AttentionMaskInterface.register("forgetful", lambda *args, **kwargs: None)
    model.set_attn_implementation("forgetful")
    result = self_test(model, "cpu")
    assert not result.passed
    assert result.packed_error > 1e-2
    assert result.leak > 1e-2


def test_the_self_test_leaves_the_model_as_it_was() -> None:
    model = tiny_model("mistral", sliding_window=256).train()
    before = [p.clone() for p in model.parameters()]
    choose_attention(model, None, "cpu")
    assert model.training
    assert model.config.sliding_window == 256
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("requested", [Attention.FLASH_ATTENTION_2, Attention.FLASH_ATTENTION_4, Attention.VARLEN])
def test_a_requested_backend_that_does_not_work_here_is_refused(requested: Attention) -> None:
    with pytest.raises(RunError, match=f"attention {requested.value} does not work for LlamaForCausalLM on cpu") as e:
        choose_attention(tiny_model("llama"), requested, "cpu")
    assert (e.value.code, e.value.path) == (ExitCode.CONFIGURATION, "spec.trainer.attention")
    assert "or choose one of" in e.value.message


def test_a_requested_backend_that_works_is_taken() -> None:
    choice = choose_attention(tiny_model("gemma2"), Attention.SDPA, "cpu")
    assert choice.backend == "sample_softcap"
    assert choice.reason.startswith("asked for, and passes the self-test")


def test_sdpa_asked_for_a_model_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(RunError, match="Leave it out") as e:
        choose_attention(tiny_model("bloom"), Attention.SDPA, "cpu")
    assert e.value.path == "spec.trainer.attention"


def test_padded_batches_take_stock_attention_and_refuse_what_is_for_packed_ones() -> None:
    model = tiny_model("llama")
    choose_attention(model, None, "cpu")
    assert padded_attention(model).backend == model.config._attn_implementation == "sdpa"
    assert padded_attention(model, Attention.SDPA).backend == "sdpa"
    assert padded_attention(tiny_model("gemma2"), Attention.SDPA).backend == "eager"
    with pytest.raises(RunError, match="varlen takes packed batches only"):
        padded_attention(model, Attention.VARLEN)
    with pytest.raises(RunError, match="flash_attention_2 is not installed"):
        padded_attention(model, Attention.FLASH_ATTENTION_2)


def test_a_packed_backend_without_lengths_raises_rather_than_attend_to_everything() -> None:
    register_backends()
    model = tiny_model("llama")
    model.set_attn_implementation("sample_sdpa")
    with pytest.raises(ValueError, match="needs packed samples"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("window", [None, 8])
def test_varlen_calls_the_installed_torch_as_it_wants_to_be_called(window: int | None) -> None:
    """On meta tensors: names and shapes of what is passed, and the backward pass. What it computes needs a GPU."""
    query = torch.empty(1, 8, 64, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    key = torch.empty(1, 2, 64, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    starts = torch.empty(4, device="meta", dtype=torch.int32)
    out, _ = varlen(
        nn.Module(), query, key, key, None, 0.1, sliding_window=window, cu_seq_lens_q=starts, max_length_q=30
    )
    assert out.shape == (1, 64, 8, 32)
    out.sum().backward()
    assert key.grad is not None
    assert key.grad.shape == key.shape


def test_text_is_generated_under_stock_attention() -> None:
    model = tiny_model("llama").eval()
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    choose_attention(model, None, "cpu")
    with stock_attention(model):
        generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, expected)
    assert model.config._attn_implementation == "sample_sdpa"


def test_gradients_flow_through_activation_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        choose_attention(model, None, "cpu")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        packed_logits(model, random_samples(LENGTHS)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)
