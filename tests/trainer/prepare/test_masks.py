"""Templates without generation tags, and awkward ones: masked by verified prefixes, or refused with the reason."""

from __future__ import annotations

import pytest

from sft_trainer.prepare.conversations import Conversation
from sft_trainer.prepare.masks import MaskRefused, Renderer, TemplateFailed
from tests.trainer.prepare.conversations import MULTI_TURN, REASONING, SINGLE, SYSTEM, Messages

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
TRIMS = HEAD + "{{ m.content | trim }}<|im_end|>\n{% endfor %}" + PROMPT
FORGETS_REASONING = (
    HEAD + "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
)
ENDS_ONCE = HEAD + "{{ m.content }}\n{% endfor %}{% if not add_generation_prompt %}<|im_end|>{% endif %}" + PROMPT
COUNTS = "{{ messages | length }} messages\n" + PLAIN
NEEDS_AN_ANSWER = (
    "{% if messages[-1].role != 'assistant' %}{{ raise_exception('end with an answer') }}{% endif %}" + PLAIN
)


def renderer(template: str) -> Renderer:
    return Renderer(template, template, {"bos_token": "<s>", "eos_token": "<|im_end|>"}, "<|im_end|>")


def trained(template: str, messages: Messages, unmask: bool = False) -> list[str]:
    rendering = renderer(template).render(Conversation(messages, None, unmask))
    return [rendering.text[start:stop] for start, stop in rendering.spans]


@pytest.mark.parametrize("messages", [SINGLE, SYSTEM, MULTI_TURN], ids=["single", "system", "multi-turn"])
def test_prefixes_find_what_the_assistant_says_and_the_end_of_its_turn(messages: Messages) -> None:
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert trained(PLAIN, messages) == [f"{answer}<|im_end|>" for answer in answers]


def test_a_template_that_trims_content_is_trained_on_as_it_writes() -> None:
    answers = [m["content"].strip() for m in MULTI_TURN if m["role"] == "assistant"]
    assert trained(TRIMS, MULTI_TURN) == [f"{answer}<|im_end|>" for answer in answers]


def test_two_answers_in_a_row_are_both_trained_on() -> None:
    messages = [*SINGLE, {"role": "assistant", "content": "More."}]
    assert trained(PLAIN, messages) == ["The answer is 42.<|im_end|>", "More.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (FORGETS_REASONING, REASONING, "rewrites earlier turns when later ones follow"),
        (COUNTS, MULTI_TURN, "rewrites earlier turns when later ones follow"),
        (ENDS_ONCE, MULTI_TURN, "rewrites earlier turns when later ones follow"),
        (NEEDS_AN_ANSWER, SINGLE, "cannot write the first 1 messages alone: end with an answer"),
    ],
    ids=["forgets reasoning", "counts messages", "ends once", "needs an answer"],
)
def test_a_template_whose_prefixes_do_not_hold_is_refused(template: str, messages: Messages, why: str) -> None:
    with pytest.raises(MaskRefused, match=why):
        trained(template, messages)


def test_a_refusal_shows_where_the_texts_part() -> None:
    with pytest.raises(MaskRefused, match=r"of 7 messages.*<think>Let me think.*where all together give.*Done\."):
        trained(FORGETS_REASONING, REASONING)


def test_a_template_that_rewrites_history_may_be_used_where_it_rewrites_nothing() -> None:
    assert trained(FORGETS_REASONING, MULTI_TURN) == trained(PLAIN, MULTI_TURN)
    single = [SINGLE[0], {"role": "assistant", "reasoning_content": "Hm.", "content": "42"}]
    assert trained(FORGETS_REASONING, single) == ["<think>Hm.</think>42<|im_end|>"]


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("{% generation %}", "{% endgeneration %}"),
        ("{%- generation -%}", "{%- endgeneration -%}"),
        ("{%+ generation +%}", "{%+ endgeneration +%}"),
        ("{% generation %}\n  ", "\n    {% endgeneration %}\n"),
        ("  {%-generation-%}\n\n", "  \n {%-endgeneration-%}\n"),
        ("\n\t{%- generation %}\n", "{% endgeneration -%}\n\n"),
    ],
)
def test_generation_tags_are_found_however_they_trim_white_space(opening: str, closing: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:"
        + opening
        + "{{ m.content }}<|im_end|>"
        + closing
        + "{% else %}U:{{ m.content }};{% endif %}{% endfor %}"
    )
    rendering = renderer(template).render(Conversation(MULTI_TURN, None, unmask=False))
    answers = [m["content"] for m in MULTI_TURN if m["role"] == "assistant"]
    assert [rendering.text[a:b].strip() for a, b in rendering.spans] == [f"{a}<|im_end|>".strip() for a in answers]


def test_generation_tags_within_a_macro_are_found() -> None:
    template = (
        "{% macro turn(m) %}[{{ m.role }}]{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) if m.role == 'assistant' else m.content }}{% endfor %}"
    )
    assert trained(template, SINGLE) == ["The answer is 42.<|im_end|>"]


def test_generation_tags_around_no_turn_train_on_nothing() -> None:
    assert (
        trained("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", SINGLE) == []
    )


def test_text_that_is_changed_after_it_was_marked_is_refused() -> None:
    template = "{% set words %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ words[:8] }}"
    with pytest.raises(MaskRefused, match="changed again after it was marked"):
        trained(template, SINGLE)


def test_a_default_system_prompt_is_not_trained_on_under_unmask() -> None:
    template = "<|im_start|>system\nBe good.<|im_end|>\n" + PLAIN
    (words,) = trained(template, SINGLE, unmask=True)
    assert words == ("What is the answer?<|im_end|>\n<|im_start|>assistant\nThe answer is 42.<|im_end|>")


def test_a_system_message_folded_into_the_first_question_is_not_trained_on_under_unmask() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 %}{{ messages[0].content }}\n\n"
        "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    (words,) = trained(template, SYSTEM, unmask=True)
    assert words == "What is the answer? [/INST] The answer is 42.<|im_end|>"


def test_words_that_the_template_leaves_out_are_refused_under_unmask() -> None:
    template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(MaskRefused, match="the words of message 1 of 2 cannot be found"):
        trained(template, SINGLE, unmask=True)


def test_nothing_but_system_messages_trains_on_nothing_under_unmask() -> None:
    assert trained(PLAIN, SYSTEM[:1], unmask=True) == []


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no systems here') }}", "no systems here"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% for m in messages %}", r"line 1 of the template"),
        ("{{ messages[0].nothing.further }}", "has no attribute 'nothing'"),
    ],
)
def test_a_template_that_fails_says_why(template: str, why: str) -> None:
    with pytest.raises(TemplateFailed, match=why):
        trained(template, SINGLE)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(TemplateFailed, match="unsafe"):
        trained("{{ messages.__class__.__mro__ }}", SINGLE)
