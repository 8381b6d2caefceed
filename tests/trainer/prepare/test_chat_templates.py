"""Every built-in template over every shape of conversation: ids as plain, trained exactly what the assistant says."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_api.spec import Overlong
from sft_trainer.prepare.chat import encoder_spec
from sft_trainer.prepare.conversations import parse_conversation
from sft_trainer.prepare.masks import TemplateFailed
from sft_trainer.prepare.samples import Encoder, Sample
from tests.trainer.prepare.builders import byte_level, load, metaspace, save_model_folder, with_bos
from tests.trainer.prepare.conversations import MULTI_TURN, REASONING, SINGLE, SYSTEM, TOOL, TOOLS, Messages

BUILT_IN = ("ChatML", "Llama3", "Granite", "Mistral", "Zephyr")
END = {
    "ChatML": "<|im_end|>",
    "Llama3": "<|eot_id|>",
    "Granite": "<|end_of_text|>",
    "Mistral": "</s>",
    "Zephyr": "</s>",
}
THINK = {
    "ChatML": "<think>\n{}\n</think>\n\n",
    "Llama3": "<think>\n{}\n</think>\n\n",
    "Granite": "<think>{}</think>",
    "Mistral": "[THINK]{}[/THINK]",
    "Zephyr": "<think>\n{}\n</think>\n\n",
}
CALLS = {
    "ChatML": [
        'Adding.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 4}}\n</tool_call>',
    ],
    "Llama3": [
        'Adding.\n{"name": "add", "parameters": {"a": 1, "b": 2}}',
        '{"name": "add", "parameters": {"a": 3}}\n{"name": "add", "parameters": {"a": 4}}',
    ],
    "Granite": [
        'Adding.<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": 2}}]',
        '<|tool_call|>[{"name": "add", "arguments": {"a": 3}}, {"name": "add", "arguments": {"a": 4}}]',
    ],
    "Mistral": [
        'Adding.[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2}}]',
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 3}}, {"name": "add", "arguments": {"a": 4}}]',
    ],
}
SHAPES = {"single": SINGLE, "system": SYSTEM, "multi-turn": MULTI_TURN, "reasoning": REASONING, "tool": TOOL}


@pytest.fixture(scope="module", params=["plain", "begins with bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's tokenizer, without a chat template."""
    tokenizer = byte_level() if request.param == "plain" else with_bos(byte_level())
    return save_model_folder(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module", params=BUILT_IN)
def named(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Any]:
    return request.param, load(folder, name=request.param)


def encode(tokenizer: Any, messages: Messages, tools: object = None, unmask: bool = False) -> Sample:
    encoder = Encoder(encoder_spec(tokenizer, 4096, Overlong.TRUNCATE))
    return encoder.encode(parse_conversation({"messages": messages, "tools": tools, "unmask": unmask}))


def trained(tokenizer: Any, sample: Sample) -> list[str]:
    """What is trained on, decoded, stretch by stretch."""
    runs = groupby(zip(sample.ids, sample.mask, strict=True), key=lambda pair: bool(pair[1]))
    return [tokenizer.decode([int(token) for token, _ in run], skip_special_tokens=False) for on, run in runs if on]


def said(name: str, messages: Messages) -> list[str]:
    """What the assistant says in the format, turn by turn, with its end."""
    calls = iter(CALLS.get(name, []))
    turns = [message for message in messages if message["role"] == "assistant"]
    return [
        (THINK[name].format(turn["reasoning_content"]) if "reasoning_content" in turn else "")
        + (next(calls) if "tool_calls" in turn else turn["content"])
        + END[name]
        for turn in turns
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_what_the_assistant_says_is_trained_on(named: tuple[str, Any], shape: str) -> None:
    name, tokenizer = named
    if (name, shape) == ("Zephyr", "tool"):
        with pytest.raises(TemplateFailed, match="the Zephyr format has no tool calls"):
            encode(tokenizer, TOOL)
        return
    tools = TOOLS if shape == "tool" else None
    messages = SHAPES[shape]
    sample = encode(tokenizer, messages, tools)
    assert trained(tokenizer, sample) == said(name, messages)
    plain = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    assert sample.ids.tolist() == plain
    assert not sample.mask[0]


@pytest.mark.parametrize("shape", ["single", "multi-turn", "reasoning"])
def test_the_mask_is_the_one_that_transformers_gives(named: tuple[str, Any], shape: str) -> None:
    _, tokenizer = named
    sample = encode(tokenizer, SHAPES[shape])
    peer = tokenizer.apply_chat_template(
        SHAPES[shape], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sample.mask.astype(int).tolist() == peer["assistant_masks"]


def test_unmask_trains_on_all_roles_but_system(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    sample = encode(tokenizer, MULTI_TURN, unmask=True)
    (words,) = trained(tokenizer, sample)
    whole = tokenizer.apply_chat_template(MULTI_TURN, tokenize=False)
    assert words == whole[whole.index("What is the answer?") :].removesuffix("\n")
    assert "Be happy" not in words
    assert words.endswith(END[name])


def test_unmask_leaves_a_later_system_message_out(named: tuple[str, Any]) -> None:
    _, tokenizer = named
    messages = [*SINGLE, {"role": "system", "content": "Now be brief."}, {"role": "user", "content": "And?"}, SINGLE[1]]
    first, rest = trained(tokenizer, encode(tokenizer, messages, unmask=True))
    assert first.startswith("What is the answer?")
    assert "And?" in rest
    assert "Now be brief." not in first + rest


def test_the_prompt_of_generation_is_what_stands_before_the_answer(named: tuple[str, Any]) -> None:
    _, tokenizer = named
    sample = encode(tokenizer, SYSTEM)
    prompt = tokenizer.apply_chat_template(SYSTEM[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert int(np.flatnonzero(sample.mask)[0]) == len(prompt)


def test_bos_begins_a_conversation_where_tokenizer_or_format_say_so(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    ids = encode(tokenizer, MULTI_TURN).ids
    assert np.count_nonzero(ids == tokenizer.bos_token_id) == int(begins or name in ("Llama3", "Mistral"))
    assert (ids[0] == tokenizer.bos_token_id) == (begins or name in ("Llama3", "Mistral"))


def test_the_tools_are_written_into_the_text_but_not_trained_on(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    if name == "Zephyr":
        return
    sample = encode(tokenizer, TOOL, TOOLS)
    text = tokenizer.decode(sample.ids, skip_special_tokens=False)
    assert "Adds <two> numbers" in text
    assert text.count("Use tools.") == 1
    assert "Adds" not in "".join(trained(tokenizer, sample))


def test_content_as_a_list_of_texts_is_content_as_a_string(named: tuple[str, Any]) -> None:
    _, tokenizer = named
    parts = [{"type": "text", "text": "The answer "}, {"type": "text", "text": "is 42."}]
    listed = encode(tokenizer, [SINGLE[0], {"role": "assistant", "content": parts}])
    assert listed.ids.tolist() == encode(tokenizer, SINGLE).ids.tolist()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_tokenizer_that_writes_blanks_as_a_character_is_masked_as_transformers_does(
    name: str, tmp_path: Path
) -> None:
    tokenizer = load(save_model_folder(tmp_path, metaspace()), name=name)
    sample = encode(tokenizer, MULTI_TURN)
    peer = tokenizer.apply_chat_template(MULTI_TURN, return_dict=True, return_assistant_tokens_mask=True)
    assert sample.ids.tolist() == peer["input_ids"]
    assert sample.mask.astype(int).tolist() == peer["assistant_masks"]
