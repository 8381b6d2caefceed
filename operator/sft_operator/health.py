"""/healthz and /readyz: whether the operator still does its work, by what it has done and not by what it has heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

LONGEST_RUN_SECONDS = 300.0
SHORTEST_PATIENCE_SECONDS = 120.0


@dataclass
class Health:
    """What is looked at. A replica that waits for its turn is well, and ready to take it."""

    resync_seconds: float
    is_leader: bool = False
    last_list: Callable[[], float | None] = lambda: None
    """When everything was last listed, by the loop's clock."""
    oldest_run: Callable[[], float] = lambda: 0.0
    """For how many seconds the run that has gone on longest has."""

    def illness(self) -> str | None:
        """What a restart may help against; none where nothing is wrong."""
        if not self.is_leader:
            return None
        if (seconds := self.oldest_run()) > LONGEST_RUN_SECONDS:
            return f"a run has gone on for {seconds:.0f} s"
        listed = self.last_list()
        age = 0.0 if listed is None else asyncio.get_running_loop().time() - listed
        if age > max(3 * self.resync_seconds, SHORTEST_PATIENCE_SECONDS):
            return f"the last complete list is {age:.0f} s old"
        return None

    def unreadiness(self) -> str | None:
        """What is still to come; none where nothing is."""
        return "not everything is listed yet" if self.is_leader and self.last_list() is None else None


@asynccontextmanager
async def served(health: Health, port: int) -> AsyncIterator[None]:
    """While this lasts, both answer: 200, or 503 and why."""
    app = web.Application()
    app.add_routes([web.get("/healthz", answer(health.illness)), web.get("/readyz", answer(health.unreadiness))])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    try:
        yield
    finally:
        await runner.cleanup()


def answer(problem: Callable[[], str | None]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        found = problem()
        return web.Response(status=503 if found else 200, text=f"{found or 'ok'}\n")

    return handle
