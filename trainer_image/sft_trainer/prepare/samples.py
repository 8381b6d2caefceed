"""Records as samples: token ids and loss mask, cut, split or dropped by length, each loss counted by its reason.

A conversation's ids are those of its plain rendering, tokenised once as a whole; the mask follows character offsets.
A document is bos (where the tokenizer begins texts with it), its text and eos, and every token but the first is a
target. Longer than `max_length`:

    Truncate    a conversation keeps its beginning; a document goes on in further samples, each of which begins with
                the last token of the one before, so that every token is a target exactly once
    Drop        it is left out
    Fail        it stops the job
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sft_api.spec import DataFormat, Overlong
from sft_trainer.prepare.conversations import Conversation, parse_conversation, parse_document
from sft_trainer.prepare.masks import Renderer, Span

EMPTY = "empty"
"""No messages, or a text without a character."""
NO_LOSS_TOKENS = "noLossTokens"
"""Nothing in it is trained on: nothing that the assistant says."""
NO_LOSS_TOKENS_LEFT = "noLossTokensAfterTruncation"
"""What is trained on lies behind maxSequenceLength."""
TOO_LONG = "tooLong"
"""Longer than maxSequenceLength, under Drop."""


class TooLong(Exception):
    """A sample is longer than `max_length`, under Fail; the message says by how much."""


@dataclass(frozen=True)
class Sample:
    """Token ids and which of them are targets; the first never is."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]

    @property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.mask))

    def content(self) -> int:
        """64-bit hash of ids and mask."""
        digest = hashlib.blake2b(self.ids.tobytes(), digest_size=8)
        digest.update(pack_mask(self.mask))
        return int.from_bytes(digest.digest(), "little")


@dataclass
class Tally:
    """What became of the records."""

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    """Conversations that lost their end."""
    split: int = 0
    """Documents that became several samples; nothing of them is lost."""

    def add(self, other: Tally) -> None:
        self.records += other.records
        self.dropped.update(other.dropped)
        self.truncated += other.truncated
        self.split += other.split


@dataclass(frozen=True)
class EncoderSpec:
    """All that an Encoder is made of, small enough to send to another process."""

    backend: str
    """`Tokenizer.to_str()`."""
    renderer: Renderer | None
    """None where the tokenizer has no chat template."""
    bos: int | None
    """Id that begins a document; none where the tokenizer does not begin texts with one."""
    eos: int
    max_length: int
    overlong: Overlong


class Encoder:
    """Turns records into samples. Holds no state between records."""

    def __init__(self, spec: EncoderSpec):
        self.spec = spec
        self._tokenizer = Tokenizer.from_str(spec.backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def samples(self, record: dict[str, object], format: DataFormat, tally: Tally) -> list[Sample]:
        """The record's samples: usually one; none where it is dropped.

        Raises MalformedRecord, TemplateFailed, MaskRefused, TooLong.
        """
        tally.records += 1
        if format is DataFormat.MESSAGES:
            conversation = parse_conversation(record)
            return self._conversation(conversation, tally) if conversation.messages else _drop(tally, EMPTY)
        text = parse_document(record)
        return self._document(text, tally) if text.strip() else _drop(tally, EMPTY)

    def encode(self, conversation: Conversation) -> Sample:
        """A conversation at its full length. Raises TemplateFailed, MaskRefused."""
        assert self.spec.renderer is not None
        rendering = self.spec.renderer.render(conversation)
        encoding = self._tokenizer.encode(rendering.text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        mask = mask_of_spans(encoding.offsets, rendering.spans)
        mask[:1] = False
        return Sample(ids, mask)

    def _conversation(self, conversation: Conversation, tally: Tally) -> list[Sample]:
        sample = self.encode(conversation)
        length = len(sample.ids)
        if not sample.mask.any():
            return _drop(tally, NO_LOSS_TOKENS if length else EMPTY)
        if length <= self.spec.max_length:
            return [sample]
        if self._is_refused(length):
            return _drop(tally, TOO_LONG)
        sample = Sample(sample.ids[: self.spec.max_length], sample.mask[: self.spec.max_length])
        if not sample.mask.any():
            return _drop(tally, NO_LOSS_TOKENS_LEFT)
        tally.truncated += 1
        return [sample]

    def _document(self, text: str, tally: Tally) -> list[Sample]:
        spec = self.spec
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        whole = np.array([*([] if spec.bos is None else [spec.bos]), *ids, spec.eos], dtype=np.int32)
        if len(whole) < 2:
            return _drop(tally, NO_LOSS_TOKENS)
        if len(whole) > spec.max_length:
            if self._is_refused(len(whole)):
                return _drop(tally, TOO_LONG)
            tally.split += 1
        # Each piece but the first sees one token that was a target already.
        starts = range(0, len(whole) - 1, spec.max_length - 1)
        return [_all_targets(whole[start : start + spec.max_length]) for start in starts]

    def _is_refused(self, length: int) -> bool:
        """Whether a sample that is too long is dropped. Raises TooLong under Fail."""
        if self.spec.overlong is Overlong.FAIL:
            raise TooLong(
                f"is {length} tokens long; batch.maxSequenceLength is {self.spec.max_length} and batch.overlong Fail. "
                "Raise the one, or set the other to Truncate or Drop"
            )
        return self.spec.overlong is Overlong.DROP


def mask_of_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens hold a character of a span. offsets: [tokens] of characters [start, stop); returns [tokens]."""
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    # Some tokens stand for no character of the text; they belong where they stand.
    starts, stops = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)
    mask = np.zeros(len(places), dtype=np.bool_)
    for start, stop in spans:
        mask |= (starts < stop) & (stops > start)
    return mask


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """One bit a token, the lowest first."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_mask(packed: bytes, length: int) -> NDArray[np.bool_]:
    """[length], of what pack_mask made."""
    bits = np.frombuffer(packed, dtype=np.uint8)
    return np.unpackbits(bits, count=length, bitorder="little").view(np.bool_)


def plain_backend(backend: Tokenizer) -> str:
    """A tokenizer that gives the same ids, and the offsets of every character: its post-processor, which only adds
    special tokens (never asked for here) and trims blanks off the offsets, is taken out."""
    plain = Tokenizer.from_str(backend.to_str())
    plain.post_processor = None
    plain.no_truncation()
    plain.no_padding()
    return plain.to_str()


def _all_targets(ids: NDArray[np.int32]) -> Sample:
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[0] = False
    return Sample(ids, mask)


def _drop(tally: Tally, reason: str) -> list[Sample]:
    tally.dropped[reason] += 1
    return []
