"""An event loop whose clock jumps to the next timer instead of waiting for it: minutes of back-off in no time.

For code that waits for timers and its own tasks alone; what waits for a socket would see time fly.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
STUCK_SECONDS = 1e6


class Clock(selectors.DefaultSelector):
    """Where the loop would sleep, the time passes."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen: a task waits for what nobody does"
        self.now += max(0.0, timeout)
        assert self.now < STUCK_SECONDS, "the test goes on for ever"
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = Clock()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)
