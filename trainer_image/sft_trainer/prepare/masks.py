"""Conversations as text, and which of its characters are trained on: verified, or refused.

Three ways, all of which leave the text exactly as the template writes it:

    spans       the template marks what the assistant says with {% generation %} … {% endgeneration %}
    prefixes    it does not: what the assistant says is what a message adds to the text of those before it and the
                generation prompt. That holds only where each of these texts is a prefix of the whole
    unmask      everything but system messages and what stands before the first other message
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sft_trainer.prepare.conversations import SYSTEM_ROLES, Conversation, Message

Span = tuple[int, int]
"""Characters [start, stop) of a text."""

# Noncharacters: Unicode keeps them for internal use, text for interchange holds none.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"[{_OPEN}{_CLOSE}]")
_START_TAG = re.compile(r"\{%[-+]?\s*generation\s*(?P<trim>[-+]?)%\}")
_END_TAG = re.compile(r"\{%(?P<trim>[-+]?)\s*endgeneration\s*[-+]?%\}")


class MaskRefused(Exception):
    """The template cannot be masked safely for this conversation; the message says why."""


class TemplateFailed(Exception):
    """The template raised an error for this conversation; the message is its own."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as text. `spans`: the characters trained on, in order, none overlapping."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class Renderer:
    """A chat template with its special tokens. Pickles; renders as `tokenizer.apply_chat_template` does."""

    template: str
    tool_template: str
    """The template for conversations with tools; most tokenizers have one for both."""
    special_tokens: dict[str, Any]
    """`tokenizer.special_tokens_map`."""
    end_of_turn: str
    _marked: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def text(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False) -> str:
        """`messages` as text; with `prompt`, up to where the assistant would begin to speak. Raises TemplateFailed."""
        return self._render(self.tool_template if tools else self.template, messages, tools, prompt=prompt)

    def render(self, conversation: Conversation) -> Rendering:
        """The text and what of it is trained on. Raises TemplateFailed or MaskRefused."""
        text = self.text(conversation.messages, conversation.tools)
        if conversation.unmask:
            spans = self._all_but_system(conversation, text)
        elif self.has_generation_tags(bool(conversation.tools)):
            spans = self._generation_spans(conversation, text)
        else:
            spans = self._prefix_spans(conversation, text)
        return Rendering(
            text, [span for span in (self._without_tail(text, *span) for span in spans) if span[0] < span[1]]
        )

    def has_generation_tags(self, tools: bool = False) -> bool:
        return bool(_START_TAG.search(self.tool_template if tools else self.template))

    def _render(
        self, template: str, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **self.special_tokens
            )
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise TemplateFailed(f"{error.message}{f' (line {line} of the template)' if line else ''}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error
        return str(rendered[0])

    def _generation_spans(self, conversation: Conversation, text: str) -> list[Span]:
        """Where the template's own marks lie, seen by writing a character at each end of each marked stretch."""
        source = self.tool_template if conversation.tools else self.template
        if source not in self._marked:
            self._marked[source] = with_marks(source)
        marked = self._render(self._marked[source], conversation.messages, conversation.tools)
        if _MARK.sub("", marked) != text:
            raise MaskRefused("what it marks with {% generation %} is changed again after it was marked")
        return _spans_of_marks(marked)

    def _prefix_spans(self, conversation: Conversation, text: str) -> list[Span]:
        messages, tools = conversation.messages, conversation.tools
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            last = index == len(messages) - 1
            before = self._part(messages[:index], tools, prompt=True)
            through = text if last else self._part(messages[: index + 1], tools)
            for prefix, what in ((before, f"the {index} before it"), (through, f"the first {index + 1}")):
                if not text.startswith(prefix):
                    raise MaskRefused(_rewritten(what, len(messages), prefix, text))
            if len(through) < len(before):
                raise MaskRefused(f"message {index + 1} of {len(messages)} adds nothing to the text before it")
            spans.append((len(before), len(through)))
        return spans

    def _part(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False) -> str:
        try:
            return self.text(messages, tools, prompt=prompt)
        except TemplateFailed as error:
            raise MaskRefused(f"it cannot write the first {len(messages)} messages alone: {error}") from error

    def _all_but_system(self, conversation: Conversation, text: str) -> list[Span]:
        """From the first word that is not the system's to the end, later system messages left out."""
        messages = conversation.messages
        others = [index for index, message in enumerate(messages) if message["role"] not in SYSTEM_ROLES]
        if not others:
            return []
        start = self._place(conversation, others[0], text)[0]
        spans = []
        for index in range(others[0], len(messages)):
            if messages[index]["role"] in SYSTEM_ROLES:
                place = self._place(conversation, index, text)
                spans.append((start, place[0]))
                start = place[1]
        return [*spans, (start, len(text))]

    def _place(self, conversation: Conversation, index: int, text: str) -> Span:
        """Where the words of a message lie: what changes in the text when they are others."""
        messages = list(conversation.messages)
        spoken = ("reasoning_content", "content")
        messages[index] = messages[index] | {
            key: _OPEN for key in spoken if messages[index].get(key) or key == "content"
        }
        other = self._part(messages, conversation.tools)
        start = _common_prefix(text, other)
        stop = len(text) - _common_prefix(text[start:][::-1], other[start:][::-1])
        if _OPEN not in other[start : len(other) - (len(text) - stop)]:
            raise MaskRefused(f"the words of message {index + 1} of {len(messages)} cannot be found in the text")
        return start, stop

    def _without_tail(self, text: str, start: int, stop: int) -> Span:
        """White space that a template writes after the end of a turn is not the assistant's."""
        spoken = text[start:stop].rstrip()
        return (start, start + len(spoken)) if spoken.endswith(self.end_of_turn) else (start, stop)


def with_marks(template: str) -> str:
    """The template, writing a mark at the start and the end of whatever stands between generation tags.

    Jinja trims white space around tags (on request, and with trim_blocks and lstrip_blocks as chat templates are
    compiled). The marks stand between tag and text, so they trim in the tag's stead.
    """

    def opened(match: re.Match[str]) -> str:
        return f'{match[0].rstrip()}{{{{ "{_OPEN}" {"-" if match["trim"] == "-" else ""}}}}}'

    def closed(match: re.Match[str]) -> str:
        return f'{{{{{"-" if match["trim"] == "-" else ""} "{_CLOSE}" }}}}{match["tag"]}'

    # A tag without a sign eats the newline after it, and the blanks before it at a line's start.
    start = re.compile(_START_TAG.pattern.replace(r"%\}", r"(?:(?<=[-+])%\}|(?<![-+])%\}\n?)"))
    stop = re.compile(rf"(?:(?<=\n)[ \t]*(?=\{{%[^-+]))?(?P<tag>{_END_TAG.pattern})")
    return stop.sub(closed, start.sub(opened, template))


def _spans_of_marks(marked: str) -> list[Span]:
    spans: list[Span] = []
    starts: list[int] = []
    for seen, mark in enumerate(_MARK.finditer(marked)):
        position = mark.start() - seen
        if mark[0] == _OPEN:
            starts.append(position)
        elif len(starts) == 1:
            spans.append((starts.pop(), position))
        elif starts:
            starts.pop()
        else:
            raise MaskRefused("its {% generation %} marks come out in disorder")
    if starts:
        raise MaskRefused("its {% generation %} marks come out in disorder")
    return spans


def _rewritten(what: str, count: int, prefix: str, text: str) -> str:
    at = _common_prefix(prefix, text)
    alone, whole = (repr(part[max(0, at - 12) : at + 28]) for part in (prefix, text))
    return (
        f"it rewrites earlier turns when later ones follow: of {count} messages, {what} alone give {alone} "
        f"where all together give {whole}"
    )


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix, by bisection: comparisons run in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
