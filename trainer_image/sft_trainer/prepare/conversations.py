"""What a record must be, and what becomes of it before it is rendered: checked, content as text, nulls gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

Message = dict[str, Any]
"""A message as a chat template sees it: `role`, `content`, perhaps `reasoning_content`, `tool_calls`, …"""

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_ROLES = ("system", "developer")


class MalformedRecord(ValueError):
    """A record that is not what its format asks for: what it is, what is allowed."""


@dataclass(frozen=True)
class Conversation:
    """One record of format Messages."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    unmask: bool
    """Whether all roles but system are trained on, not the assistant's alone."""


def parse_conversation(record: dict[str, object]) -> Conversation:
    """Fields of the record that are not known (ids, sources) are passed over; those within a message reach the
    template.

    Raises MalformedRecord.
    """
    messages = record.get("messages")
    if not isinstance(messages, list):
        has = ", ".join(record) or "nothing"
        raise MalformedRecord(f"has no list `messages`; it has {has}")
    unmask = record.get("unmask")
    if not isinstance(unmask, bool | None):
        raise MalformedRecord(f"`unmask` is {unmask!r}; allowed are true and false")
    parsed = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return Conversation(parsed, _tools(record.get("tools")), bool(unmask))


def parse_document(record: dict[str, object]) -> str:
    """The text of a record of format Pretraining. Raises MalformedRecord."""
    text = record.get("text")
    if not isinstance(text, str):
        has = ", ".join(record) or "nothing"
        raise MalformedRecord(f"has no string `text`; it has {has}")
    return text


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise MalformedRecord(f"{where} is no object with `role` and `content`")
    # As apply_chat_template does: many templates write "None" for a null that they take for text.
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise MalformedRecord(f"{where}.role is {role!r}; allowed are {', '.join(ROLES)}")
    if "content" in message:
        message["content"] = _text(message["content"], f"{where}.content")
    elif role != "assistant" or not (message.get("tool_calls") or message.get("reasoning_content")):
        raise MalformedRecord(f"{where} has no `content`")
    return message


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if isinstance(text, str))
    raise MalformedRecord(f'{where} is neither a string nor a list of {{"type": "text", "text": …}}')


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """Tool schemas; also as one JSON string, for tables cannot hold schemas of many shapes."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError as error:
            raise MalformedRecord(f"`tools` is a string that is not JSON ({error.msg})") from error
    if tools is None or tools == "" or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MalformedRecord("`tools` is no list of objects")
    return tools
