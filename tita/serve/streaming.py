"""Streaming responses, and detection of clients that disconnect."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client closed the connection before it had a response."""


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client of `receive` disconnects.

    Raises:
        ClientDisconnected: the client closed the connection.
    """
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, listener), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for each in (task, listener):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await each


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamResponse(Response):
    """A response that sends chunks as they come, and closes their source on a disconnect.

    Unlike Starlette's `StreamingResponse`, it also detects a disconnect while it waits for the next
    chunk, so that a queued request of a client that has gone is cancelled at once.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], *, media_type: str) -> None:
        # `x-accel-buffering` stops proxies such as nginx from buffering the stream.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(media_type=media_type, headers=headers)
        # Starlette sets the length of an empty body; the length of a stream is unknown.
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with contextlib.suppress(ClientDisconnected, OSError):
                await cancel_on_disconnect(receive, self._send(send))
        finally:
            await self._chunks.aclose()

    async def _send(self, send: Send) -> None:
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
