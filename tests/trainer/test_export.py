"""An exported model is one that anybody can load, and that answers and stops."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from examples.make_model import make_model
from sft_api.run import ExitCode, RunError
from sft_api.spec import ChatTemplate, Model, Precision
from sft_trainer.attention import choose_attention, stock_attention
from sft_trainer.export import export_model, upload_export
from sft_trainer.loss import PackedLM
from sft_trainer.model import load_model
from sft_trainer.store import Store
from sft_trainer.tokenizer import load_tokenizer
from tests.gang import Gangs
from tests.trainer.architectures import tiny_model
from tests.trainer.engine_cases import running

QUESTION, ANSWER = "What is the colour of the sky?", "It is blue."
MESSAGES = [{"role": "user", "content": QUESTION}]


def bf16_state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().bfloat16().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Any]:
    """A base model with the ChatML template, trained on one answer until it knows it."""
    folder = make_model(tmp_path_factory.mktemp("base"), [QUESTION, ANSWER], tie_embeddings=request.param)
    source = Model(uri=f"file://{folder}", chat_template=ChatTemplate(name="ChatML"))
    tokenizer = load_tokenizer(folder, source)
    model = load_model(folder, source, tokenizer, Precision.FP32, seed=0)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    ids = tokenizer(f"{text}{ANSWER}{tokenizer.eos_token}", return_tensors="pt").input_ids
    choose_attention(model, None, "cpu")
    module = PackedLM(model)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, : prompt.shape[1] - 1] = -100
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss, _ = module(
            input_ids=ids,
            labels=labels,
            position_ids=torch.arange(ids.shape[1])[None],
            cu_seq_lens=torch.tensor([0, ids.shape[1]], dtype=torch.int32),
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss.detach()) < 0.1
    return model, tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("base"), [QUESTION]))


@pytest.fixture(scope="module")
def exported(trained: tuple[PreTrainedModel, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export_model(bf16_state(trained[0]), *trained, folder)
    return folder


def test_what_is_loaded_gives_the_logits_of_the_trained_model_in_bf16(
    trained: tuple[PreTrainedModel, Any], exported: Path
) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(exported, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    model = trained[0]
    state, ids = bf16_state(model), torch.tensor([[5, 6, 7, 8]])
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, state[name]), name
    before = {name: p.data for name, p in model.named_parameters()}
    try:
        for name, p in model.named_parameters():
            p.data = state[name]
        with torch.no_grad(), stock_attention(model):
            assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids, use_cache=False).logits)
    finally:
        for name, p in model.named_parameters():
            p.data = before[name]


def test_the_configs_are_those_of_a_model_for_inference(exported: Path) -> None:
    config, generation = (json.loads((exported / f).read_text()) for f in ("config.json", "generation_config.json"))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True
    assert config["vocab_size"] == len(tokenizer)
    assert config["eos_token_id"] == end_of_turn
    assert generation["eos_token_id"] == [end_of_turn, end_of_text]
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert not any("attn" in key or "sample_sdpa" in str(value) for key, value in config.items())
    assert tokenizer.chat_template
    assert not list(exported.glob("*.bin"))


def test_generation_with_the_chat_template_answers_and_stops_at_the_end_of_turn(exported: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=50, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == f"{ANSWER}<|im_end|>"


def test_the_pipeline_answers_messages(exported: Path) -> None:
    answer = pipeline("text-generation", str(exported))(MESSAGES, max_new_tokens=50, do_sample=False)
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": ANSWER}


def test_large_weights_go_into_shards(trained: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    export_model(bf16_state(trained[0]), *trained, tmp_path, shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("in_the_way", ["model.safetensors", "config.json"])
def test_a_disk_that_does_not_take_it_is_named_with_what_to_do(
    trained: tuple[PreTrainedModel, Any], tmp_path: Path, in_the_way: str
) -> None:
    """A folder in a file's place fails as a full disk does: in the library that writes the weights, or in Python."""
    (tmp_path / in_the_way / "folder").mkdir(parents=True)
    with pytest.raises(RunError, match=rf"cannot be written to {tmp_path}: .*(os error|Errno)") as caught:
        export_model(bf16_state(trained[0]), *trained, tmp_path)
    assert caught.value.code == ExitCode.STORE_REFUSED
    assert "the checkpoints are whole" in caught.value.message


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_neox", "gemma2", "granitemoe"])
def test_weights_are_written_under_their_published_names(architecture: str, tokenizer: Any, tmp_path: Path) -> None:
    """Experts that transformers holds as one tensor are written one by one, as other programs read them."""
    model = tiny_model(architecture)
    export_model(bf16_state(model), model, tokenizer, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    for (name, mine), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), theirs.bfloat16()), name
    if architecture == "mixtral":
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in file.keys()  # noqa: SIM118


def test_a_generation_config_that_transformers_would_refuse_is_made_valid(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.temperature = 0.6  # without do_sample
    export_model(bf16_state(model), model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["do_sample"] is True


def export_under_zero3(folder: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with running(PackedLM(model), 3) as engine:
        state = engine.full_state_dict()
        if state:
            export_model(state, model, tokenizer, Path(folder) / "exported")


def test_a_model_whose_weights_are_spread_by_zero_3_is_exported_whole(
    gang: Gangs, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    gang(2).run(export_under_zero3, str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    for name, parameter in tiny_model("llama", tie_word_embeddings=False).named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name


# ------------------------------------------------------------------------------------------------- upload


def contents(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    return folder


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = f"file://{tmp_path}/run" if request.param == "file" else request.getfixturevalue("s3_bucket") + "/run"
    return Store.open(uri).child("export/instruct")


def test_an_upload_is_complete_last_and_its_manifest_names_every_file(folder: Path, store: Store) -> None:
    total = upload_export(folder, store, {"phase": "instruct", "step": 7})
    found = contents(store)
    assert set(found) == {"config.json", "model.safetensors", "MANIFEST.json", "COMPLETE"}
    manifest = json.loads(found["MANIFEST.json"])
    assert (manifest["phase"], manifest["step"]) == ("instruct", 7)
    assert manifest["files"] == {
        name: {"bytes": len(found[name]), "sha256": hashlib.sha256(found[name]).hexdigest()}
        for name in ("config.json", "model.safetensors")
    }
    assert total == 702


def test_another_export_replaces_one_that_is_there(folder: Path, store: Store) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"a shard of the old one")
    upload_export(folder, store, {"step": 7})
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "config.json").write_text('{"new": 1}')
    upload_export(folder, store, {"step": 9})
    found = contents(store)
    assert set(found) == {"config.json", "model.safetensors", "MANIFEST.json", "COMPLETE"}
    assert found["config.json"] == b'{"new": 1}'
    assert json.loads(found["MANIFEST.json"])["step"] == 9


def test_an_equal_export_that_is_complete_is_left_alone(folder: Path, store: Store) -> None:
    upload_export(folder, store, {"step": 7})
    before = {info.key: info.modified for info in store.list()}
    assert upload_export(folder, store, {"step": 7}) == 702
    assert {info.key: info.modified for info in store.list()} == before


def test_the_manifest_is_that_of_the_last_export_even_where_no_weight_changed(folder: Path, store: Store) -> None:
    upload_export(folder, store, {"step": 7})
    upload_export(folder, store, {"step": 9})
    assert json.loads(store.get("MANIFEST.json"))["step"] == 9


def test_a_half_written_export_is_finished(folder: Path, store: Store) -> None:
    store.put("model.safetensors", b"half")
    upload_export(folder, store, {"step": 7})
    assert contents(store)["model.safetensors"] == b"weights" * 100
    assert store.head("COMPLETE")
