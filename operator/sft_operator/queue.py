"""A keyed work queue: any number of calls for a key are one run of it, and a key is never run twice at a time.

A run that fails is tried again after a back-off of its own; a run that takes too long has failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

LOG = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)

WORKERS = 8
"""More only lengthen the API server's answers."""
RUN_SECONDS = 120.0
"""A run's calls have time-outs of their own, which come first."""
FIRST_BACK_OFF_SECONDS = 1.0
LONGEST_BACK_OFF_SECONDS = 300.0


class WorkQueue(Generic[Key]):
    """Runs `run(key)` for every key that was added, and again after the seconds that it returns."""

    def __init__(
        self,
        run: Callable[[Key], Awaitable[float | None]],
        *,
        expected: tuple[type[Exception], ...] = (),
        run_seconds: float = RUN_SECONDS,
    ):
        self._run = run
        self._expected = expected
        """Errors that say in their message all there is to say: logged without a traceback."""
        self._run_seconds = run_seconds
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._dirty: set[Key] = set()
        self._active: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._idle = asyncio.Event()
        self._is_closed = False

    def add(self, key: Key) -> None:
        """Have the key run: now, or once more if it is being run."""
        if self._is_closed or key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._active:
            self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Have the key run so much later. Of two such calls the earlier time counts."""
        loop = asyncio.get_running_loop()
        timer, due = self._timers.get(key), loop.time() + seconds
        if self._is_closed or (timer is not None and timer.when() <= due):
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._fire, key)

    async def work(self) -> None:
        """Run what is added, for ever."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(WORKERS):
                workers.create_task(self._worker())

    async def drain(self, seconds: float) -> None:
        """Take nothing more, and wait for what is being run, but no longer than this."""
        self._is_closed = True
        for timer in self._timers.values():
            timer.cancel()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._dirty.clear()
        self._settle()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            LOG.warning("gave up waiting for the runs of %s", ", ".join(str(key) for key in self._active))

    def oldest_seconds(self) -> float:
        """How long the run that has gone on longest has; 0 where none does."""
        return asyncio.get_running_loop().time() - min(self._active.values()) if self._active else 0.0

    def _fire(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    async def _worker(self) -> None:
        while True:
            key = await self._ready.get()
            self._dirty.discard(key)
            self._active[key] = asyncio.get_running_loop().time()
            try:
                await self._run_once(key)
            finally:
                del self._active[key]
                if key in self._dirty:
                    self._ready.put_nowait(key)
                self._settle()

    async def _run_once(self, key: Key) -> None:
        try:
            async with asyncio.timeout(self._run_seconds):
                again = await self._run(key)
        except Exception as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            seconds = back_off_seconds(failures)
            is_told = isinstance(error, (TimeoutError, *self._expected))
            what = "took too long" if isinstance(error, TimeoutError) else f"failed: {error}"
            LOG.warning("%s: the run %s; again in %g s", key, what, seconds, exc_info=not is_told)
            self.add_after(key, seconds)
            return
        self._failures.pop(key, None)
        if again is not None:
            self.add_after(key, again)

    def _settle(self) -> None:
        self._idle.set() if not self._active else self._idle.clear()


def back_off_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return float(min(FIRST_BACK_OFF_SECONDS * 2.0 ** min(failures - 1, 30), LONGEST_BACK_OFF_SECONDS))
