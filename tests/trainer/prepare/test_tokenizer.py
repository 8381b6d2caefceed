"""The tokenizer as the job wants it: templates applied and tried, special tokens added, pad, bos and eos in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from sft_api.run import ExitCode, RunError
from sft_api.spec import ChatTemplate, Model
from sft_trainer.prepare.chat import BUILT_IN_NAMES, check_chat_template
from sft_trainer.tokenizer import BUILT_IN, PLAIN_MODEL_TYPES, load_tokenizer
from tests.trainer.prepare.builders import byte_level, load, save_model_folder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE = "spec.model.chatTemplate"


def own(folder: Path, template: str, special: tuple[str, ...] = (), **tokens: str) -> Path:
    return save_model_folder(folder, byte_level(special=("<s>", "</s>", *special)), template, **tokens)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_brings_its_tokens_and_ends_turns_with_eos(tmp_path: Path, name: str) -> None:
    tokenizer = load(save_model_folder(tmp_path), name=name)
    wanted = BUILT_IN[name]
    for token in (*wanted.special_tokens, tokenizer.eos_token, tokenizer.pad_token):
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.eos_token == (wanted.end_of_turn or "</s>")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.bos_token == "<s>"
    assert max(tokenizer.get_vocab().values()) < len(tokenizer)


def test_the_names_of_the_built_in_templates_are_those_of_the_api() -> None:
    allowed = ChatTemplate.model_json_schema()["properties"]["name"]["anyOf"][0]["enum"]
    assert sorted(allowed) == sorted(BUILT_IN) == sorted(BUILT_IN_NAMES)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_template_works_with_a_tokenizer_that_has_no_special_token_at_all(tmp_path: Path, name: str) -> None:
    folder = save_model_folder(tmp_path, byte_level(special=()))
    tokenizer = load(folder, name=name)
    assert tokenizer.eos_token == (BUILT_IN[name].end_of_turn or "</s>")
    assert tokenizer.bos_token == BUILT_IN[name].begin
    assert tokenizer.pad_token == "<|pad|>"


def test_what_was_applied_is_there_again_after_saving(tmp_path: Path) -> None:
    tokenizer = load(save_model_folder(tmp_path / "a"), name="ChatML")
    tokenizer.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"model_type": "llama"}')
    again = load(tmp_path / "b")
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokens_that_are_there_are_not_added_again(tmp_path: Path) -> None:
    special = ("<|im_start|>", "<|im_end|>", "<|pad|>")
    folder = save_model_folder(tmp_path, byte_level(special=("<s>", "</s>", *special)))
    before = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = load(folder, name="ChatML")
    assert len(tokenizer) == len(before["model"]["vocab"])
    assert tokenizer.eos_token_id == 3
    assert tokenizer.pad_token_id == 4


def test_a_word_of_the_vocabulary_becomes_a_whole_token(tmp_path: Path) -> None:
    plain = byte_level()
    state = json.loads(plain.to_str())
    state["model"]["vocab"]["[INST]"] = len(state["model"]["vocab"])
    tokenizer = load(save_model_folder(tmp_path, Tokenizer.from_str(json.dumps(state))), name="Mistral")
    assert tokenizer.encode("a[INST]b", add_special_tokens=False)[1] == state["model"]["vocab"]["[INST]"]


@pytest.mark.parametrize(
    ("special", "tokens", "pad"),
    [
        ((), {"bos_token": "<s>", "eos_token": "</s>"}, "<|pad|>"),
        ((), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, "<|pad|>"),
        (("<pad>",), {"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
        (("[PAD]",), {"eos_token": "</s>"}, "[PAD]"),
        (("<|endoftext|>",), {"eos_token": "</s>"}, "<|endoftext|>"),
        (("<|endoftext|>",), {"bos_token": "<|endoftext|>", "eos_token": "</s>"}, "<|pad|>"),
        (("<|endoftext|>", "<|finetune_right_pad_id|>"), {"eos_token": "</s>"}, "<|finetune_right_pad_id|>"),
    ],
)
def test_pad_is_there_and_is_not_eos(
    tmp_path: Path, special: tuple[str, ...], tokens: dict[str, str], pad: str
) -> None:
    tokenizer = load(save_model_folder(tmp_path, byte_level(special=("<s>", "</s>", *special)), **tokens))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_an_inline_template_is_applied_with_its_tokens(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path)
    tokenizer = load(folder, inline=CHATML, special_tokens=["<|im_start|>"], end_of_turn="<|im_end|>")
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids("<|im_start|>")
    ]


def test_a_template_may_lie_at_a_uri(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    tokenizer = load(save_model_folder(tmp_path / "m"), uri=f"file://{tmp_path}/t.jinja", end_of_turn="<|im_end|>")
    assert tokenizer.chat_template == CHATML
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="is not text") as error:
        load(save_model_folder(tmp_path / "m"), uri=f"file://{tmp_path}/t.jinja", end_of_turn="<|im_end|>")
    assert error.value.path == f"{TEMPLATE}.uri"


def test_a_tokenizers_own_end_of_turn_becomes_eos(tmp_path: Path) -> None:
    folder = own(tmp_path, CHATML, ("<|im_start|>", "<|im_end|>"))
    tokenizer = load(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    check_chat_template(tokenizer)


def test_an_own_template_that_fails_is_no_matter_until_conversations_need_it(tmp_path: Path) -> None:
    tokenizer = load(own(tmp_path, "{{ raise_exception('never') }}"))
    with pytest.raises(RunError, match="fails on a question and an answer: never") as error:
        check_chat_template(tokenizer)
    assert (error.value.code, error.value.path) == (ExitCode.CONFIGURATION, TEMPLATE)


HEADLESS = CHATML.partition("{% if add")[0]
FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"inline": "{% for m in messages %}"}, r"fails on a question and an answer: .*line 1 of the template", TEMPLATE),
    ({"inline": "{{ messages[5].content }}"}, "fails on a question and an answer", TEMPLATE),
    (
        {"inline": "{% for m in messages if m.role == 'assistant' %}{{ m.content }}</s>{% endfor %}"},
        "loses words of a question and an answer",
        TEMPLATE,
    ),
    (
        {"inline": "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}x{% endgeneration %}"},
        "loses words",
        TEMPLATE,
    ),
    ({"inline": "{{ messages | length }}" + CHATML}, "cannot be masked safely: it rewrites earlier turns", TEMPLATE),
    (
        {"inline": HEADLESS, "end_of_turn": "<|im_end|>"},
        r"takes no account of add_generation_prompt, so that '<\|im_start\|>assistant' would count",
        TEMPLATE,
    ),
    (
        {"inline": CHATML, "special_tokens": ["<|im_start|>", "<|im_end|>"]},
        r"ends the assistant's turn with .*42\..* not with the tokenizer's end of .*seems to be '<\|im_end",
        f"{TEMPLATE}.endOfTurn",
    ),
    (
        {
            "inline": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}</s>{% endfor %}",
        },
        r"leaves '</s>' out of \{% generation %\}",
        TEMPLATE,
    ),
]


@pytest.mark.parametrize(("template", "message", "path"), FAULTS)
def test_a_faulty_template_is_refused_at_once(
    tmp_path: Path, template: dict[str, Any], message: str, path: str
) -> None:
    with pytest.raises(RunError, match=message) as error:
        load(save_model_folder(tmp_path), **template)
    assert (error.value.code, error.value.path) == (ExitCode.CONFIGURATION, path)


def test_a_tokenizer_without_any_end_needs_one_with_an_inline_template(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path, byte_level(special=()))
    with pytest.raises(RunError, match="give the token that ends the assistant's turn") as error:
        load(folder, inline=CHATML)
    assert error.value.path == f"{TEMPLATE}.endOfTurn"
    with pytest.raises(RunError, match="has no end-of-sequence token") as error:
        load(folder)
    assert error.value.path == TEMPLATE


def test_a_folder_without_a_tokenizer_is_a_mistake_in_the_model(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no tokenizer that can be loaded") as error:
        load_tokenizer(tmp_path, Model(uri=f"file://{tmp_path}"))
    assert (error.value.code, error.value.path) == (ExitCode.MODEL, "spec.model.uri")


def test_no_training_library_is_imported_to_prepare(tmp_path: Path) -> None:
    """In an interpreter of its own: tokenizer, template, and a preparation."""
    save_model_folder(tmp_path / "model")
    program = """
import sys
from pathlib import Path
from tests.trainer.prepare.builders import chat, job, load, phase, run, write_jsonl
folder = Path(sys.argv[1])
write_jsonl(folder / "a.jsonl", [chat("a", "b")])
prepared = run(job(phase(f"file://{folder}/a.jsonl")), folder / "out", load(folder / "model", name="Granite"))
assert prepared.summaries[prepared.phases[0]].samples == 1
loaded = {"torch", "deepspeed"} & set(sys.modules)
assert not loaded, loaded
"""
    root = Path(__file__).parents[3]
    paths = [str(root / source) for source in (".", "api", "trainer_image")]
    environment = {"PYTHONPATH": ":".join(paths), "PATH": "", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment, timeout=300)


def test_models_whose_tokenizer_is_read_as_it_is_are_read_so_by_transformers_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto import tokenization_auto

    assert not set(PLAIN_MODEL_TYPES) & tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    folder = save_model_folder(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    for model_type in PLAIN_MODEL_TYPES:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        asked = AutoTokenizer.from_pretrained(folder)
        assert type(asked) is type(plain), model_type
        assert asked.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()


def test_a_tokenizer_of_another_class_is_loaded_as_transformers_loads_it(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert load(folder, name="ChatML").eos_token == "<|im_end|>"
