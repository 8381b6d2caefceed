"""The tokenizer as the job wants it: its chat template, the tokens that this needs, and pad, bos and eos in order.

Afterwards eos is the token that ends the assistant's turn, pad exists and is not eos, and the model needs at least
`len(tokenizer)` rows of embeddings. Imports no torch where the tokenizer's class is the plain one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_api.run import ExitCode, RunError
from sft_api.spec import ChatTemplate, Model
from sft_trainer.prepare.chat import PROBE, TEMPLATE_PATH, begins_with_bos, check_chat_template, token_after_answer
from sft_trainer.prepare.sources import read_object

_FOLDER = Path(__file__).parent / "chat_templates"
_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")
"""Tokens that are there to pad with, or for nothing else once eos is another."""

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
PLAIN_MODEL_TYPES = ("gpt_neox", "granite", "granitemoe", "llama", "mistral", "olmo2", "qwen3", "smollm3", "starcoder2")
"""Models for which AutoTokenizer takes the plain class at its word; a test asks it."""


@dataclass(frozen=True)
class BuiltIn:
    """A chat template of ours, and what its format asks of the tokenizer."""

    file: str
    special_tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None
    """None: the tokenizer's own end of sequence, `</s>` where it has none."""
    begin: str | None = None
    """What begins a conversation where the tokenizer has no bos. None: only a tokenizer that begins all texts with
    bos begins conversations with it."""


BUILT_IN = {
    "ChatML": BuiltIn("chatml.jinja", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "Llama3": BuiltIn(
        "llama3.jinja", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "<|begin_of_text|>"
    ),
    "Granite": BuiltIn(
        "granite.jinja",
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|end_of_text|>"),
        "<|end_of_text|>",
    ),
    "Mistral": BuiltIn(
        "mistral.jinja",
        (
            *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[THINK]", "[/THINK]"),
        ),
        begin="<s>",
    ),
    "Zephyr": BuiltIn("zephyr.jinja"),
}


def load_tokenizer(folder: Path, model: Model) -> Any:
    """The tokenizer in `folder`, with the job's chat template applied and tried.

    Raises RunError: MODEL where there is no usable tokenizer, CONFIGURATION where the given template fails.
    """
    tokenizer = _load(folder, model)
    given = model.chat_template
    if given is not None and given.name is not None:
        _apply_built_in(tokenizer, BUILT_IN[given.name])
    elif given is not None:
        _apply_given(tokenizer, given)
    elif tokenizer.chat_template is not None:
        _reconcile_own(tokenizer)
    _reconcile_pad(tokenizer)
    if given is not None:
        check_chat_template(tokenizer)
    return tokenizer


def _load(folder: Path, model: Model) -> Any:
    try:
        if _is_plain(folder):
            from transformers import PreTrainedTokenizerFast as loader
        else:
            from transformers import AutoTokenizer as loader
        tokenizer = loader.from_pretrained(
            str(folder), trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises whatever its files lead to
        raise RunError(
            ExitCode.MODEL, f"{model.uri} holds no tokenizer that can be loaded: {error}", "spec.model.uri"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        message = (
            f"{model.uri} has a tokenizer of class {kind}, which cannot tell where in a text its tokens lie: "
            "a tokenizer.json is needed."
        )
        raise RunError(ExitCode.MODEL, message, "spec.model.uri")
    if tokenizer.eos_token is None and model.chat_template is None:
        message = f"the tokenizer of {model.uri} has no end-of-sequence token: give a chat template with endOfTurn."
        raise RunError(ExitCode.MODEL, message, TEMPLATE_PATH)
    return tokenizer


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer would read tokenizer.json as it is. Asking it would import torch: many seconds."""
    settings = _json(folder / "tokenizer_config.json")
    return (
        (folder / "tokenizer.json").is_file()
        and not (folder / "tekken.json").is_file()
        and settings.get("tokenizer_class") in PLAIN_CLASSES
        and "auto_map" not in settings
        and _json(folder / "config.json").get("model_type") in PLAIN_MODEL_TYPES
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _apply_built_in(tokenizer: Any, built_in: BuiltIn) -> None:
    template = (_FOLDER / built_in.file).read_text()
    _add_tokens(tokenizer, built_in.special_tokens)
    if built_in.begin is not None and tokenizer.bos_token is None:
        _set_token(tokenizer, "bos_token", built_in.begin)
    if built_in.begin is not None or begins_with_bos(tokenizer):
        template = "{{- bos_token }}" + template
    _set_token(tokenizer, "eos_token", built_in.end_of_turn or tokenizer.eos_token or "</s>")
    tokenizer.chat_template = template


def _apply_given(tokenizer: Any, given: ChatTemplate) -> None:
    if given.uri is not None:
        try:
            tokenizer.chat_template = read_object(given.uri, f"{TEMPLATE_PATH}.uri").decode()
        except UnicodeDecodeError as error:
            raise RunError(
                ExitCode.CONFIGURATION, f"{given.uri} is not text: {error}.", f"{TEMPLATE_PATH}.uri"
            ) from error
    else:
        tokenizer.chat_template = given.inline
    _add_tokens(tokenizer, tuple(given.special_tokens))
    if given.end_of_turn is not None:
        _set_token(tokenizer, "eos_token", given.end_of_turn)
    if tokenizer.eos_token is None:
        message = (
            "neither the tokenizer nor the template has an end of turn: give the token that ends the assistant's turn."
        )
        raise RunError(ExitCode.CONFIGURATION, message, f"{TEMPLATE_PATH}.endOfTurn")


def _reconcile_own(tokenizer: Any) -> None:
    """Where the tokenizer's own template ends turns with another token than eos, that token becomes eos."""
    try:
        text = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except Exception:  # whatever a template raises: check_chat_template says it, if the data needs the template
        return
    ends = token_after_answer(tokenizer, text)
    if ends is not None and ends != tokenizer.eos_token:
        _set_token(tokenizer, "eos_token", ends)


def _reconcile_pad(tokenizer: Any) -> None:
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    known = tokenizer.get_vocab()
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    there = (token for token in _PADS if token in known and token not in taken)
    _set_token(tokenizer, "pad_token", next(there, "<|pad|>"))


def _add_tokens(tokenizer: Any, tokens: tuple[str, ...]) -> None:
    """Make these whole, special tokens, whether they were words of the vocabulary or not there at all."""
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)


def _set_token(tokenizer: Any, which: str, token: str) -> None:
    tokenizer.add_special_tokens({which: token})
