"""A response of server-sent events, which ends when its client leaves."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jllama.serve.errors import ApiError

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies pass each event on at once


async def left(receive: Receive) -> None:
    """Wait until the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T], status: int) -> T:
    """The result of ``work``. If the client leaves first, cancel ``work`` and raise an `ApiError` of ``status``."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(status, "the client left before its answer")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends what ``events`` yields. ``close`` is called at the end in every case."""

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], None]) -> None:
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers(HEADERS)
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop when the client disconnects."""
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = sending.done()
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._events.aclose()
            self._close()
        if finished:
            sending.result()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
