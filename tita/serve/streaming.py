"""Streaming bodies, and noticing that a client has hung up."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client went away before its answer was there."""


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnected: it did.
    """
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait((task, listener), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        await _cancel(task, listener)


class Stream(Response):
    """A response that sends pieces as they come, and closes their source at a hang-up.

    Unlike Starlette's, it listens while it waits for the next piece: a client that goes away while
    it still queues frees its place at once.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None], *, media_type: str) -> None:
        # Proxies of the nginx kind would gather the stream without the second.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(media_type=media_type, headers=headers)
        # Its length is not known, and there is no body yet.
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sender = asyncio.ensure_future(self._send(send))
        listener = asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait((sender, listener), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except OSError:
            pass
        finally:
            await _cancel(sender, listener)
            await self._pieces.aclose()

    async def _send(self, send: Any) -> None:
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _hang_up(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
