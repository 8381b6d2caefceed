"""What a rule across fields is: said twice side by side, as CEL for an API server and as a check with a better message.

A check gets the object as the user wrote it (camelCase, nulls removed), which may be wrong in other ways too, so that
all that is wrong with a manifest can be said at once. It yields the field to blame, relative to the object, and what
is wrong. The CEL sees the object with the schema's defaults filled in. A test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sft_api.base import ApiModel
from sft_api.wording import listing

Given = Mapping[str, Any]
Wrongs = Iterator[tuple[str, str]]
Check = Callable[[Given], Wrongs]


@dataclass(frozen=True)
class Rule:
    """One rule about objects of `model`."""

    model: type[ApiModel]
    cel: str | None
    """None where an API server cannot see what the rule is about: then `sft validate` and the operator check it."""
    message: str
    """What is allowed: the API server's message."""
    check: Check


def mapping(value: object) -> Given:
    """`value`, if it is a mapping; else an empty one."""
    return value if isinstance(value, Mapping) else {}


def section(given: Given, *path: str) -> Given:
    """The mapping at `path`; an empty one where there is none."""
    for name in path:
        given = mapping(given.get(name))
    return given


def elements(given: Given, name: str) -> list[Any]:
    """The list of that name; an empty one where there is none."""
    value = given.get(name)
    return value if isinstance(value, list) else []


def count(given: Given, name: str) -> int | None:
    """A whole number, if that is what is given."""
    value = given.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def exactly_one(model: type[ApiModel], *names: str) -> Rule:
    def check(given: Given) -> Wrongs:
        present = [name for name in names if name in given]
        if len(present) != 1:
            what = f"gives {'both ' if len(present) == 2 else ''}{listing(present)}" if present else "gives none"
            yield "", f"{what}; give exactly one of {listing(names)}"

    total = " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names)
    return Rule(model, f"{total} == 1", f"give exactly one of {listing(names)}", check)
