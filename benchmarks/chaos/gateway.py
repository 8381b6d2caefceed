"""A gateway in front of an S3 server that fails as networks, servers and permissions do, and counts what passes.

It forwards requests as they are (their signature covers the host, which is the gateway's) until told to misbehave.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

from aiohttp import ClientSession, DummyCookieJar, web
from yarl import URL

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
BODY_LIMIT = 1 << 30


@dataclass(frozen=True)
class Misbehaviour:
    """What is done to requests instead of answering them."""

    status: int | None = None
    """Answer with this status; none: close the connection without an answer."""
    code: str = "InternalError"
    """S3's word for it."""
    after_seconds: float = 0.0
    """How long the client waits for it."""
    writes_only: bool = False
    """Leave reads alone."""
    lose_the_answer: bool = False
    """Carry the request out, then lose its answer."""


class Gateway:
    """Serves on a free loopback port, in a thread of its own, from `start` to `stop`."""

    def __init__(self, upstream: str):
        self.upstream = upstream
        self.port = 0
        self.on_write: Callable[[int], None] = lambda number: None
        """Called with the number of each write since `begin`, before it is carried out."""
        self._misbehaviour: Misbehaviour | None = None
        self._left = 0
        self.writes = 0
        """Since `begin`."""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def begin(self) -> None:
        """Behave, and count writes from 1."""
        self._misbehaviour, self.writes = None, 0

    def misbehave(self, how: Misbehaviour, times: int) -> None:
        """Do this to so many requests, then behave again."""
        self._misbehaviour, self._left = how, times

    @property
    def is_behaving(self) -> bool:
        return self._misbehaviour is None

    async def _serve(self) -> None:
        application = web.Application(client_max_size=BODY_LIMIT)
        application.router.add_route("*", "/{path:.*}", self._answer)
        async with ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar()) as self._client:
            runner = web.AppRunner(application, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = runner.addresses[0][1]
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        writes = request.method in ("PUT", "POST", "DELETE")
        if writes:
            self.writes += 1
            self.on_write(self.writes)
        how = self._turn(writes)
        if how is None:
            return await self._forward(request, body)
        await asyncio.sleep(how.after_seconds)
        if how.lose_the_answer:
            await self._forward(request, body)
        if how.status is None or how.lose_the_answer:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)
        words = f"<Error><Code>{how.code}</Code><Message>injected</Message></Error>"
        return web.Response(status=how.status, text=words, content_type="application/xml")

    def _turn(self, writes: bool) -> Misbehaviour | None:
        """What is to be done to this request."""
        how = self._misbehaviour
        if how is None or (how.writes_only and not writes):
            return None
        self._left -= 1
        if self._left <= 0:
            self._misbehaviour = None
        return how

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        url = URL(f"{self.upstream}{request.raw_path}", encoded=True)
        try:
            async with self._client.request(
                request.method, url, headers=headers, data=BytesIO(body) if body else None, allow_redirects=False,
                skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
            ) as answer:  # fmt: skip
                content = await answer.read()
                kept = [(n, v) for n, v in answer.headers.items() if n.lower() not in HOP_BY_HOP]
                if request.method == "HEAD":
                    return web.Response(status=answer.status, headers=kept)
                kept = [(n, v) for n, v in kept if n.lower() != "content-length"]
                return web.Response(status=answer.status, headers=kept, body=content)
        except OSError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)
