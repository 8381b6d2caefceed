"""The work queue: what of many calls is run, when again, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from sft_operator.queue import RUN_SECONDS, WORKERS, WorkQueue, back_off_seconds
from tests.operator.virtual_time import run

Run = Callable[[str], Awaitable[float | None]]


@asynccontextmanager
async def working(queue: WorkQueue[str]) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Runs:
    """Counts the runs of a key, and lets a test wait for one."""

    def __init__(self, *outcomes: float | Exception | None) -> None:
        self.times: list[float] = []
        self._outcomes = list(outcomes)
        self._happened = asyncio.Condition()

    async def __call__(self, key: str) -> float | None:
        self.times.append(asyncio.get_running_loop().time())
        async with self._happened:
            self._happened.notify_all()
        outcome = self._outcomes.pop(0) if self._outcomes else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def reach(self, number: int) -> None:
        async with self._happened:
            await self._happened.wait_for(lambda: len(self.times) >= number)


def test_many_calls_for_a_key_before_it_is_run_are_one_run() -> None:
    async def main() -> int:
        runs = Runs()
        queue = WorkQueue(runs)
        for _ in range(100):
            queue.add("a")
        async with working(queue):
            await runs.reach(1)
            await asyncio.sleep(60)
        return len(runs.times)

    assert run(main()) == 1


def test_a_key_that_is_added_while_it_is_run_is_run_once_more_and_never_twice_at_a_time() -> None:
    async def main() -> tuple[int, int]:
        begun, go_on = asyncio.Event(), asyncio.Event()
        at_once = most_at_once = num_runs = 0

        async def one(key: str) -> None:
            nonlocal at_once, most_at_once, num_runs
            at_once, num_runs = at_once + 1, num_runs + 1
            most_at_once = max(most_at_once, at_once)
            begun.set()
            await go_on.wait()
            at_once -= 1

        queue = WorkQueue(one)
        async with working(queue):
            queue.add("a")
            await begun.wait()
            for _ in range(10):
                queue.add("a")
            await asyncio.sleep(1)
            go_on.set()
            await asyncio.sleep(1)
        return num_runs, most_at_once

    assert run(main()) == (2, 1)


def test_different_keys_are_run_at_a_time_up_to_the_number_of_workers() -> None:
    async def main() -> int:
        at_once = most_at_once = 0

        async def one(key: str) -> None:
            nonlocal at_once, most_at_once
            at_once += 1
            most_at_once = max(most_at_once, at_once)
            await asyncio.sleep(1)
            at_once -= 1

        queue = WorkQueue(one)
        async with working(queue):
            for number in range(3 * WORKERS):
                queue.add(str(number))
            await asyncio.sleep(10)
        return most_at_once

    assert run(main()) == WORKERS


def test_a_key_is_run_again_after_the_seconds_that_its_run_asks_for() -> None:
    async def main() -> list[float]:
        runs = Runs(10.0, 0.0)
        queue = WorkQueue(runs)
        async with working(queue):
            queue.add("a")
            await runs.reach(3)
        return runs.times

    assert run(main()) == pytest.approx([0.0, 10.0, 10.0])


def test_of_two_times_for_a_key_the_earlier_counts() -> None:
    async def main() -> list[float]:
        runs = Runs()
        queue = WorkQueue(runs)
        async with working(queue):
            queue.add_after("a", 30)
            queue.add_after("a", 5)
            queue.add_after("a", 60)
            await runs.reach(1)
            await asyncio.sleep(100)
        return runs.times

    assert run(main()) == pytest.approx([5.0])


def test_a_run_that_fails_is_tried_again_ever_later_until_it_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[float]:
        runs = Runs(ValueError("no"), ValueError("no"), ValueError("still no"), 100.0, ValueError("again"))
        queue = WorkQueue(runs, expected=(ValueError,))
        async with working(queue):
            queue.add("a")
            await runs.reach(6)
        return runs.times

    with caplog.at_level(logging.WARNING):
        assert run(main()) == pytest.approx([0, 1, 3, 7, 107, 108])
    assert caplog.messages[2] == "a: the run failed: still no; again in 4 s"
    assert not any(record.exc_info for record in caplog.records)


def test_an_error_that_nobody_expected_is_logged_with_where_it_came_from(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        runs = Runs(KeyError("status"))
        queue = WorkQueue(runs, expected=(ValueError,))
        async with working(queue):
            queue.add("a")
            await runs.reach(2)

    run(main())
    assert caplog.messages == ["a: the run failed: 'status'; again in 1 s"]
    assert "Traceback" in caplog.text


def test_a_run_that_hangs_is_given_up_and_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[float]:
        runs = Runs()

        async def hang_once(key: str) -> float | None:
            await runs(key)
            if len(runs.times) == 1:
                await asyncio.Event().wait()
            return None

        queue = WorkQueue(hang_once)
        async with working(queue):
            queue.add("a")
            await runs.reach(1)
            await asyncio.sleep(5)
            assert queue.oldest_seconds() == pytest.approx(5)
            await runs.reach(2)
        return runs.times

    assert run(main()) == pytest.approx([0, RUN_SECONDS + 1])
    assert caplog.messages == ["a: the run took too long; again in 1 s"]


def test_draining_ends_what_is_run_and_begins_nothing() -> None:
    async def main() -> tuple[list[str], float]:
        done: list[str] = []

        async def one(key: str) -> float | None:
            await asyncio.sleep(3)
            done.append(key)
            return 1.0

        queue = WorkQueue(one)
        async with working(queue):
            queue.add("a")
            queue.add_after("b", 2)
            await asyncio.sleep(1)
            queue.add("a")
            drained = asyncio.create_task(queue.drain(20))
            await asyncio.sleep(0)
            queue.add("c")
            await drained
            seconds = asyncio.get_running_loop().time()
            await asyncio.sleep(100)
        return done, seconds

    assert run(main()) == (["a"], pytest.approx(3.0))


def test_draining_waits_no_longer_than_it_may(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> float:
        async def hang(key: str) -> None:
            await asyncio.Event().wait()

        queue = WorkQueue(hang)
        async with working(queue):
            queue.add("a")
            await asyncio.sleep(1)
            await queue.drain(20)
            return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(21)
    assert caplog.messages == ["gave up waiting for the runs of a"]


@pytest.mark.parametrize(("failures", "seconds"), [(1, 1), (2, 2), (5, 16), (9, 256), (10, 300), (1000, 300)], ids=str)
def test_the_back_off_doubles_up_to_five_minutes(failures: int, seconds: float) -> None:
    assert back_off_seconds(failures) == seconds
