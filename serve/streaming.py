"""Server-sent events, and watching whether the client is still there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qserve.serve.errors import ServeError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the frames
}

Result = TypeVar("Result")


class ClientDisconnected(Exception):
    """The client has gone; there is nobody to answer."""


def frame(content: dict[str, Any]) -> bytes:
    """One ``data:`` frame: compact JSON, characters beyond ASCII as they are."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def error_body(error: ServeError) -> dict[str, Any]:
    """The error object of the API."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.status,
        }
    }


class EventStream(Response):
    """Sends the events of a generator as they come, and closes it when the client goes.

    events: the JSON objects, without the closing ``[DONE]``. An error of theirs becomes a last
        event, since status 200 has been sent by then.
    close: called once at the end, however it comes.
    keep_alive_s: a comment is sent when nothing came for so long; 0 is never.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        close: Callable[[], None],
        keep_alive_s: float = 0.0,
    ) -> None:
        super().__init__(None, headers=HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; returns early, without an error, when the client has gone."""
        try:
            with contextlib.suppress(ClientDisconnected):
                await unless_disconnected(self._send(send), receive)
        finally:
            self._close()
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async for chunk in self._frames():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _frames(self) -> AsyncIterator[bytes]:
        try:
            async for event in keep_alive(self._events, self._keep_alive_s):
                yield KEEP_ALIVE if event is None else frame(event)
        except ServeError as error:
            yield frame(error_body(error))
        except Exception:
            logger.exception("a stream failed")
            yield frame(error_body(ServeError("The server failed to produce this stream.")))


async def keep_alive(
    events: AsyncGenerator[dict[str, Any], None], interval_s: float
) -> AsyncIterator[dict[str, Any] | None]:
    """The events, and None whenever none came for ``interval_s``; 0 gives only the events."""
    if interval_s <= 0:
        async for event in events:
            yield event
        return
    pending = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=interval_s)
            if not done:
                yield None
                continue
            arrived = pending.result()
            if arrived is None:
                return
            yield arrived
            pending = asyncio.ensure_future(anext(events, None))
    finally:
        pending.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await pending


async def unless_disconnected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of ``work``, which is cancelled when the client goes.

    receive: of a request whose body has been read in full.
    Raises ``ClientDisconnected``.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
