"""A base model is loaded whole or refused in a sentence, and fits its tokenizer."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from examples.make_model import make_model
from sft_api.run import ExitCode, RunError
from sft_api.spec import Model, Precision
from sft_trainer.model import load_model, model_numbers, model_numbers_of
from tests.trainer.architectures import PACKABLE, UNPACKABLE, tiny_model

TEXTS = ["Why is the sky blue? Because of Rayleigh scattering."]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), TEXTS, tie_embeddings=request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), TEXTS, tie_embeddings=False)


def source(folder: Path) -> Model:
    return Model(uri=f"file://{folder}")


def chat_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Three tokens more than the model was made for; the last ends a turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|system|>"], "eos_token": "<|im_end|>"})
    return tokenizer


def load(folder: Path) -> Any:
    return load_model(folder, source(folder), chat_tokenizer(folder), Precision.FP32, seed=1)


def test_new_tokens_get_the_mean_of_the_old_rows(folder: Path) -> None:
    model, before = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    old = before.get_input_embeddings().weight.shape[0]
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        now, then = getattr(model, layer)().weight, getattr(before, layer)().weight
        assert now.shape[0] == old + 3 == model.config.vocab_size
        assert torch.equal(now[:old], then)
        torch.testing.assert_close(now[old:], then.double().mean(0).float().expand(3, -1), rtol=0, atol=1e-7)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        before.get_output_embeddings().weight is before.get_input_embeddings().weight
    )


def test_new_tokens_in_spare_rows_get_the_mean_too_and_the_size_stays(base: Path, tmp_path: Path) -> None:
    spare = AutoModelForCausalLM.from_pretrained(base)
    rows = spare.get_input_embeddings().weight.shape[0]
    spare.resize_token_embeddings(rows + 8, mean_resizing=False)
    shutil.copytree(base, tmp_path / "spare")
    spare.save_pretrained(tmp_path / "spare")
    weight = load(tmp_path / "spare").get_input_embeddings().weight
    then = spare.get_input_embeddings().weight
    assert weight.shape[0] == rows + 8
    torch.testing.assert_close(weight[rows : rows + 3], then[:rows].mean(0).expand(3, -1), rtol=0, atol=1e-7)
    assert torch.equal(weight[rows + 3 :], then[rows + 3 :])


def test_two_ranks_load_the_same_bits(base: Path) -> None:
    first, second = load(base).state_dict(), load(base).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_in_bf16_parameters_are_rounded_and_buffers_are_not(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    exact, rounded = (load_model(base, source(base), tokenizer, p, 1) for p in (Precision.FP32, Precision.BF16))
    for name, parameter in rounded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16())
    buffers = dict(rounded.named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        assert torch.equal(buffer, exact.get_buffer(name)), name


def test_special_tokens_are_agreed_on_and_generation_ends_as_before_too(base: Path) -> None:
    model, tokenizer = load(base), chat_tokenizer(base)
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert model.config.eos_token_id == end_of_turn
    assert model.generation_config.eos_token_id == [end_of_turn, end_of_text]
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id) == (tokenizer.pad_token_id, tokenizer.bos_token_id)
    assert model.config.use_cache is False
    assert model.training


def test_a_token_that_only_used_to_pad_learns(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "pads")
    change_config(tmp_path / "pads", pad_token_id=2)  # eos, as many configs have it
    model = load(tmp_path / "pads")
    model(torch.tensor([[5, 2, 7]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[2].any()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(truncate_weights, "SafetensorError", id="truncated-weights"),
        pytest.param(lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors", id="no-weights"),
        pytest.param(drop_a_tensor, "its weights lack 1 tensors (model.norm.weight)", id="a-tensor-missing"),
        pytest.param(lambda f: change_config(f, num_hidden_layers=3), "weights lack 9 tensors", id="layers-missing"),
        pytest.param(
            lambda f: change_config(f, intermediate_size=100),
            "tensors have other shapes than its config says: model.layers.0.mlp.down_proj.weight",
            id="other-shapes",
        ),
        pytest.param(
            lambda f: change_config(f, model_type="lamma"), "does not know its model_type 'lamma'", id="unknown-class"
        ),
        pytest.param(
            lambda f: change_config(f, model_type="t5"),
            "models of its model_type 't5' do not generate text from left to right",
            id="not-causal",
        ),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "JSONDecodeError", id="broken-config"),
    ],
)
def test_what_cannot_be_loaded_whole_is_refused(
    base: Path, tmp_path: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    tokenizer = chat_tokenizer(base)
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    spoil(broken)
    with pytest.raises(RunError) as e:
        load_model(broken, source(broken), tokenizer, Precision.FP32, seed=1)
    assert (e.value.code, e.value.path) == (ExitCode.MODEL, "spec.model.uri")
    assert e.value.message.startswith(f"file://{broken} cannot be loaded as a causal language model: ")
    assert words in e.value.message


def test_code_of_the_model_runs_only_if_the_job_allows_it(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "custom"))
    change_config(folder, model_type="ours", auto_map={"AutoConfig": "ours.OurConfig"})
    with pytest.raises(RunError, match="brings code of its own") as e:
        model_numbers_of(folder, source(folder))
    assert e.value.path == "spec.model.trustRemoteCode"


def test_weights_that_have_no_place_in_the_model_are_named(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "more"))
    change_config(folder, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "9 tensors of the weights have no place in the model and are left out: model.layers.1" in caplog.text


def test_a_vocabulary_larger_than_the_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "small"))
    chat_tokenizer(folder).save_pretrained(folder)
    with pytest.raises(RunError, match=r"its tokenizer has \d+ tokens and its embeddings \d+ rows"):
        load_model(folder, source(folder), AutoTokenizer.from_pretrained(folder), Precision.FP32, seed=1)


# ---------------------------------------------------------------------------------------- ModelNumbers


@pytest.mark.parametrize("architecture", [*PACKABLE, *UNPACKABLE])
def test_the_numbers_of_a_config_are_those_of_its_model(architecture: str) -> None:
    model = tiny_model(architecture)
    numbers = model_numbers(model.config)
    assert numbers.parameters == sum(p.numel() for p in model.parameters())
    assert (numbers.layers, numbers.hidden, numbers.vocabulary) == (2, 64, 128)
    assert 0 < numbers.matrix_parameters <= numbers.parameters


def test_an_embedding_counts_as_a_matrix_only_where_it_is_the_head_too() -> None:
    size = 128 * 64
    untied, tied = (model_numbers(tiny_model("llama", tie_word_embeddings=tie).config) for tie in (False, True))
    assert untied.parameters == tied.parameters + size
    assert untied.matrix_parameters == tied.matrix_parameters == tied.parameters


def test_of_experts_only_those_that_a_token_passes_through_count() -> None:
    two, four = (model_numbers(tiny_model("mixtral", num_experts_per_tok=n).config) for n in (2, 4))
    experts = 2 * 4 * 3 * 64 * 96
    assert four.matrix_parameters - two.matrix_parameters == experts // 2


def test_published_sizes_come_out_of_their_configs() -> None:
    """Llama 3.2 1B (tied) and Llama 3 8B (untied), by the sizes in their published configs."""
    shared = {"vocab_size": 128_256, "num_key_value_heads": 8}
    small = model_numbers(
        AutoConfig.for_model(
            "llama", **shared, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            head_dim=64, tie_word_embeddings=True,
        )
    )  # fmt: skip
    large = model_numbers(
        AutoConfig.for_model(
            "llama", **shared, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
        )
    )
    assert small.parameters == 1_235_814_400
    assert large.parameters == 8_030_261_248
    assert large.width == 4096
    assert small.quadratic_length == pytest.approx(1_235_814_400 / (16 * 2048))
    assert large.quadratic_length == pytest.approx((8_030_261_248 - 128_256 * 4096) / (32 * 4096))


def test_without_attention_only_the_length_costs() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=128, hidden_size=64, num_hidden_layers=2)
    assert model_numbers(config).quadratic_length == math.inf
