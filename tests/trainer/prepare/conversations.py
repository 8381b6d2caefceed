"""Conversations of every shape, for tests of templates and masks."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, Any]]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
SINGLE: Messages = [
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "The answer is 42."},
]
SYSTEM: Messages = [{"role": "system", "content": "Be happy, grüß Gott 🙂."}, *SINGLE]
MULTI_TURN: Messages = [
    *SYSTEM,
    {"role": "user", "content": "  Are\n\nyou sure? "},
    {"role": "assistant", "content": "\nYes: naïve 答え 🙂\n\nand more  "},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "ok"},
]
REASONING: Messages = [
    *SYSTEM,
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "reasoning_content": "Let me think.", "content": "Done."},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "reasoning_content": "No need.", "content": "Enough."},
]
TOOL: Messages = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Add 1 and 2"},
    {
        "role": "assistant",
        "content": "Adding.",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
    },
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Both at once"},
    {
        "role": "assistant",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}},
            {"type": "function", "function": {"name": "add", "arguments": {"a": 4}}},
        ],
    },
    {"role": "tool", "content": "3, 4"},
    {"role": "assistant", "content": "3 and 4."},
]
