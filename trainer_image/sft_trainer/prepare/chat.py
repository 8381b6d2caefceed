"""A tokenizer and its chat template as preparation uses them: tried on a plain conversation, then sent to processes."""

from __future__ import annotations

from typing import Any

from sft_api.run import ExitCode, RunError
from sft_api.spec import Overlong
from sft_trainer.prepare.conversations import Conversation
from sft_trainer.prepare.masks import MaskRefused, Renderer, TemplateFailed
from sft_trainer.prepare.samples import Encoder, EncoderSpec, plain_backend

TEMPLATE_PATH = "spec.model.chatTemplate"
BUILT_IN_NAMES = ("ChatML", "Llama3", "Granite", "Mistral", "Zephyr")
_QUESTION, _ANSWER = "What is the answer?", "It is 42."
PROBE = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


def check_chat_template(tokenizer: Any) -> None:
    """Try the chat template on a plain conversation, before any data is read.

    Raises RunError(CONFIGURATION) where there is none, it fails, leaves words out, cannot be masked, or ends the
    assistant's turn otherwise than the tokenizer expects.
    """
    if tokenizer.chat_template is None:
        raise _template_error(
            "the tokenizer has no chat template, and Messages data needs one: name a built-in "
            f"({', '.join(BUILT_IN_NAMES)}), or give one inline or by uri"
        )
    conversation = Conversation(PROBE, None, unmask=False)
    encoder = Encoder(encoder_spec(tokenizer, 1 << 20, Overlong.TRUNCATE))
    renderer = encoder.spec.renderer
    assert renderer is not None
    try:
        rendering = renderer.render(conversation)
        header = _unprompted_header(renderer, rendering.text, rendering.spans)
    except TemplateFailed as error:
        raise _template_error(f"the chat template fails on a question and an answer: {error}") from error
    except MaskRefused as error:
        raise _template_error(f"the chat template cannot be masked safely: {error}") from error
    trained = "".join(rendering.text[start:stop] for start, stop in rendering.spans)
    if _QUESTION not in rendering.text or _ANSWER not in trained:
        raise _template_error(f"the chat template loses words of a question and an answer: it gives {rendering.text!r}")
    if header:
        raise _template_error(
            f"the chat template takes no account of add_generation_prompt, so that {header!r} would count as said "
            "by the assistant"
        )
    if not trained.endswith(tokenizer.eos_token):
        raise _no_end_of_turn(tokenizer, rendering.text, trained)
    ids = tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=False)
    if encoder.encode(conversation).ids.tolist() != list(ids):
        kind = type(tokenizer).__name__
        raise RunError(
            ExitCode.MODEL, f"the tokenizer's class {kind} gives other ids than its backend.", "spec.model.uri"
        )


def encoder_spec(tokenizer: Any, max_length: int, overlong: Overlong) -> EncoderSpec:
    """What the tokenising processes need of the tokenizer."""
    renderer = None
    if tokenizer.chat_template is not None:
        renderer = Renderer(
            template=tokenizer.get_chat_template(),
            tool_template=tokenizer.get_chat_template(tools=[{}]),
            special_tokens=dict(tokenizer.special_tokens_map),
            end_of_turn=tokenizer.eos_token,
        )
    bos = tokenizer.bos_token_id if begins_with_bos(tokenizer) else None
    backend = plain_backend(tokenizer.backend_tokenizer)
    return EncoderSpec(backend, renderer, bos, tokenizer.eos_token_id, max_length, overlong)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins every text with bos."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def token_after_answer(tokenizer: Any, text: str) -> str | None:
    """The added token that `text`, a rendering of PROBE, has next after the answer."""
    _, found, tail = text.rpartition(_ANSWER)
    tokens = [token for token in tokenizer.get_added_vocab() if found and tail.lstrip().startswith(token)]
    return max(tokens, key=len, default=None)


def _unprompted_header(renderer: Renderer, text: str, spans: list[tuple[int, int]]) -> str:
    """What would count as said by the assistant, though the template writes it of itself; mostly nothing."""
    if renderer.has_generation_tags() or not spans:
        return ""
    prompted = renderer.text(PROBE[:1], None, prompt=True) != renderer.text(PROBE[:1], None)
    return "" if prompted else text[spans[0][0] : text.rfind(_ANSWER)].strip()


def _no_end_of_turn(tokenizer: Any, text: str, trained: str) -> RunError:
    seen = token_after_answer(tokenizer, text)
    if seen is not None and seen == tokenizer.eos_token:
        return _template_error(
            f"the template leaves {seen!r} out of {{% generation %}} … {{% endgeneration %}}, so the model would not "
            "learn to end its turn: move endgeneration behind it"
        )
    advice = f"; it seems to be {seen!r}" if seen else ""
    return RunError(
        ExitCode.CONFIGURATION,
        f"the chat template ends the assistant's turn with {trained[-24:]!r}, not with the tokenizer's end of sequence "
        f"{tokenizer.eos_token!r}: give the token that ends a turn{advice}.",
        f"{TEMPLATE_PATH}.endOfTurn",
    )


def _template_error(message: str) -> RunError:
    return RunError(ExitCode.CONFIGURATION, f"{message}.", TEMPLATE_PATH)
