"""Records to samples: offsets to masks, documents, what is cut, split, dropped and counted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from sft_api.spec import DataFormat, Overlong
from sft_trainer.prepare.conversations import MalformedRecord
from sft_trainer.prepare.masks import Renderer
from sft_trainer.prepare.samples import (
    Encoder,
    EncoderSpec,
    Sample,
    Tally,
    TooLong,
    mask_of_spans,
    pack_mask,
    plain_backend,
    unpack_mask,
)
from tests.trainer.prepare.builders import byte_level, chat, with_bos

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
BACKEND = plain_backend(with_bos(byte_level()))
TOKENIZER = Tokenizer.from_str(BACKEND)


def encoder(max_length: int = 64, overlong: Overlong = Overlong.TRUNCATE, bos: int | None = 0) -> Encoder:
    return Encoder(EncoderSpec(BACKEND, Renderer(TEMPLATE, TEMPLATE, {}, "</s>"), bos, 1, max_length, overlong))


def encode(
    record: dict[str, Any], encoder: Encoder, format: DataFormat = DataFormat.MESSAGES
) -> tuple[list[Sample], Tally]:
    tally = Tally()
    return encoder.samples(record, format, tally), tally


def document(text: str, encoder: Encoder) -> tuple[list[Sample], Tally]:
    return encode({"text": text}, encoder, DataFormat.PRETRAINING)


@pytest.mark.parametrize("separator", ["\n", " ", "\n\n"])
def test_offsets_of_blanks_are_not_trimmed(separator: str) -> None:
    (sample,), _ = encode(chat("a", f"{separator}b{separator}"), encoder())
    words = TOKENIZER.decode(sample.ids[sample.mask].tolist(), skip_special_tokens=False)
    assert words == f"{separator}b{separator}</s>"


def test_a_character_of_several_tokens_is_trained_on_whole() -> None:
    (sample,), _ = encode(chat("🙂", "🙂答"), encoder())
    assert TOKENIZER.decode(sample.ids[sample.mask].tolist(), skip_special_tokens=False) == "🙂答</s>"
    assert sample.num_loss_tokens == 4 + 3 + 1


def test_a_token_that_straddles_the_start_of_a_turn_is_trained_on() -> None:
    vocabulary = {token: index for index, token in enumerate("ab:")} | {":a": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "a")]))
    encoding = tokenizer.encode("b:ab")
    assert encoding.tokens == ["b", ":a", "b"]
    assert mask_of_spans(encoding.offsets, [(2, 3)]).tolist() == [False, True, False]


def test_a_token_without_characters_belongs_where_it_stands() -> None:
    offsets = [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]
    assert mask_of_spans(offsets, [(1, 2)]).tolist() == [False, True, True, False, False]


def test_the_first_token_is_never_a_target() -> None:
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    spec = EncoderSpec(BACKEND, Renderer(template, template, {}, "</s>"), None, 1, 64, Overlong.TRUNCATE)
    (sample,), _ = encode({"messages": [{"role": "assistant", "content": "what"}]}, Encoder(spec))
    assert not sample.mask[0]
    assert sample.num_loss_tokens == len(sample.ids) - 1


def test_a_document_is_bos_text_eos_and_all_but_the_first_token_are_targets() -> None:
    (sample,), tally = document("What is the answer?", encoder())
    text = TOKENIZER.encode("What is the answer?", add_special_tokens=False).ids
    assert sample.ids.tolist() == [0, *text, 1]
    assert sample.mask.tolist() == [False, *[True] * (len(text) + 1)]
    assert (tally.records, tally.split, tally.truncated) == (1, 0, 0)


def test_a_document_of_a_tokenizer_without_bos_begins_with_its_text() -> None:
    (sample,), _ = document("answer", encoder(bos=None))
    assert sample.ids.tolist() == [*TOKENIZER.encode("answer", add_special_tokens=False).ids, 1]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(2, 40))
def test_a_long_document_goes_on_in_further_samples_and_every_token_is_a_target_once(length: int, limit: int) -> None:
    samples, tally = document("x" * length, encoder(limit))
    whole = [0, *TOKENIZER.encode("x" * length, add_special_tokens=False).ids, 1]
    targets = [int(token) for sample in samples for token in sample.ids[sample.mask]]
    assert targets == whole[1:]
    assert all(2 <= len(sample.ids) <= limit for sample in samples)
    assert all(a.ids[-1] == b.ids[0] for a, b in pairwise(samples))
    assert tally.split == int(len(whole) > limit)
    assert tally.truncated == 0


def test_a_truncated_conversation_keeps_its_beginning_and_is_counted() -> None:
    (whole,), _ = encode(chat("a", "b" * 40), encoder())
    (sample,), tally = encode(chat("a", "b" * 40), encoder(32))
    assert sample.ids.tolist() == whole.ids[:32].tolist()
    assert sample.mask.tolist() == whole.mask[:32].tolist()
    assert (tally.truncated, tally.dropped) == (1, {})


@pytest.mark.parametrize(
    ("record", "settings", "reason"),
    [
        (chat("a" * 60, "b"), {"max_length": 32}, "noLossTokensAfterTruncation"),
        (chat("a" * 60, "b"), {"max_length": 32, "overlong": Overlong.DROP}, "tooLong"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "noLossTokens"),
        ({"messages": []}, {}, "empty"),
    ],
)
def test_what_is_dropped_is_counted_by_its_reason(
    record: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    samples, tally = encode(record, encoder(**settings))
    assert samples == []
    assert tally == Tally(records=1, dropped=tally.dropped)
    assert tally.dropped == {reason: 1}


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_document_is_dropped_and_counted(text: str) -> None:
    samples, tally = document(text, encoder())
    assert samples == []
    assert tally.dropped == {"empty": 1}


def test_a_long_document_is_dropped_where_asked() -> None:
    samples, tally = document("x" * 99, encoder(32, Overlong.DROP))
    assert (samples, tally.dropped) == ([], {"tooLong": 1})


@pytest.mark.parametrize("record", [chat("a" * 60, "b"), {"text": "x" * 99}])
def test_fail_says_how_long_the_sample_is_and_what_to_do(record: dict[str, Any]) -> None:
    format = DataFormat.MESSAGES if "messages" in record else DataFormat.PRETRAINING
    with pytest.raises(TooLong, match=r"is \d+ tokens long; batch.maxSequenceLength is 32 .* Truncate or Drop"):
        encode(record, encoder(32, Overlong.FAIL), format)


def test_a_sample_as_long_as_allowed_is_not_too_long() -> None:
    (sample,), _ = encode(chat("a", "b" * 20), encoder())
    ((exact,), tally) = encode(chat("a", "b" * 20), encoder(len(sample.ids), Overlong.FAIL))
    assert (len(exact.ids), tally.truncated) == (len(sample.ids), 0)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_a_packed_mask_comes_back(bits: list[bool]) -> None:
    mask = np.array(bits)
    assert unpack_mask(pack_mask(mask), len(mask)).tolist() == bits


def test_content_tells_ids_and_masks_apart() -> None:
    ids, mask = np.arange(9, dtype=np.int32), np.arange(9) > 3
    contents = {
        Sample(ids, mask).content(),
        Sample(ids, ~mask).content(),
        Sample(ids + 1, mask).content(),
        Sample(ids[:8], mask[:8]).content(),
    }
    assert len(contents) == 4
    assert Sample(ids.copy(), mask.copy()).content() in contents


MALFORMED = [
    ({"text": "a"}, "has no list `messages`; it has text"),
    ({}, "has no list `messages`; it has nothing"),
    ({"messages": "a"}, "has no list `messages`"),
    ({"messages": ["a"]}, r"messages\[0\] is no object with `role` and `content`"),
    ({"messages": [{"role": "asistant", "content": "a"}]}, r"messages\[0\].role is 'asistant'; allowed are system,"),
    ({"messages": [{"content": "a"}]}, r"messages\[0\].role is None"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] has no `content`"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] has no `content`"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, r"messages\[0\] has no `content`"),
    ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\].content is neither a string nor a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content is neither a string nor a list"),
    (chat("a", "b", unmask="yes"), "`unmask` is 'yes'; allowed are true and false"),
    (chat("a", "b", tools=3), "`tools` is no list of objects"),
    (chat("a", "b", tools="{"), "`tools` is a string that is not JSON"),
]


@pytest.mark.parametrize(("record", "what"), MALFORMED)
def test_a_malformed_conversation_says_what_is_wrong(record: dict[str, Any], what: str) -> None:
    with pytest.raises(MalformedRecord, match=what):
        encode(record, encoder())


def test_a_document_without_text_says_what_it_has() -> None:
    with pytest.raises(MalformedRecord, match="has no string `text`; it has messages"):
        encode(chat("a", "b"), encoder(), DataFormat.PRETRAINING)


def test_tools_may_be_one_string_of_json() -> None:
    template = "{{ tools[0].name }}" + TEMPLATE
    spec = EncoderSpec(BACKEND, Renderer(TEMPLATE, template, {}, "</s>"), 0, 1, 64, Overlong.TRUNCATE)
    (sample,), _ = encode(chat("a", "b", tools='[{"name": "add"}]'), Encoder(spec))
    assert TOKENIZER.decode(sample.ids.tolist()).startswith("adduser")
