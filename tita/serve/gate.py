"""What every request passes before its body is read: keys, size, and whether we still serve."""

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable
from typing import Any

from tita.serve.failures import Refusal
from tita.serve.keys import Keys

Scope = dict[str, Any]
OPEN_PATHS = frozenset(
    ("/", "/healthz", "/health", "/readyz", "/metrics", "/openapi.json", "/favicon.ico")
)


_ID = re.compile(rb"[\w.:-]{1,128}")


class _Refused(Exception):
    pass


class Gate:
    """ASGI middleware; anything it refuses never reaches the application."""

    def __init__(
        self,
        app: Any,
        *,
        keys: Keys,
        max_body_bytes: int,
        body_within_s: float,
        closed: Callable[[], Refusal | None],
    ) -> None:
        """Args:
        app: the application behind.
        keys: those that are accepted.
        max_body_bytes: of a request.
        body_within_s: that a client may take to send it.
        closed: why no new work is taken in right now, or None.
        """
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._body_within_s = body_within_s
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _plain(scope)
        send = _stamped(scope, send)
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response(scope["path"])(scope, receive, send)
            return
        await self._bounded(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith("/static/"):
            return None
        headers = dict(scope["headers"])
        if self._keys.wanted and not self._knows(headers.get(b"authorization", b"")):
            return Refusal(
                "no valid API key; send 'Authorization: Bearer KEY'",
                status=401, kind="authentication_error", code="invalid_api_key",
            )  # fmt: skip
        if scope["method"] == "POST" and (closed := self._closed()):
            return closed
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self._max_body_bytes):
            return _too_large(self._max_body_bytes)
        return None

    def _knows(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        return self._keys.have(key.strip()) and scheme.lower() == b"bearer"

    async def _bounded(self, scope: Scope, receive: Any, send: Any) -> None:
        body = _Body(receive, max_bytes=self._max_body_bytes, within_s=self._body_within_s)
        started = False

        async def noting(message: Any) -> None:
            nonlocal started
            # The framework takes our exception for broken JSON; its answer is not the right one.
            if body.refusal and not started:
                return
            started = True
            await send(message)

        with contextlib.suppress(_Refused):
            await self._app(scope, body.receive, noting)
        if body.refusal and not started:
            response = body.refusal.response(scope["path"])
            # There is more to come, which nobody reads.
            response.headers["connection"] = "close"
            await response(scope, receive, send)


class _Body:
    """The body of one request as it comes in, within bounds."""

    def __init__(self, receive: Any, *, max_bytes: int, within_s: float) -> None:
        self.refusal: Refusal | None = None
        self._receive = receive
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._within_s = within_s
        self._ends = asyncio.get_running_loop().time() + within_s
        self._whole = False

    async def receive(self) -> Any:
        """What ASGI calls `receive`; once there is a refusal, whoever reads is to end."""
        try:
            # What comes after the body is that the client hangs up, some time.
            async with asyncio.timeout_at(None if self._whole else self._ends):
                message = await self._receive()
        except TimeoutError:
            what = f"the body did not come within {self._within_s:g} s"
            self.refusal = Refusal(what, status=408, code="body_too_slow")
            raise _Refused from None
        self._whole = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.refusal = _too_large(self._max_bytes)
            raise _Refused
        return message


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(f"the body has more than {max_bytes:,} bytes", status=413, code="body_too_large")


def _plain(scope: Scope) -> Scope:
    """HEAD is GET without its body (RFC 9110, 9.3.2), which uvicorn drops; a last slash is none."""
    method, path = scope["method"], scope["path"]
    return scope | {
        "method": "GET" if method == "HEAD" else method,
        "path": path.rstrip("/") or "/",
    }


def _stamped(scope: Scope, send: Any) -> Any:
    """Name the request: in its `state`, and to the client, who may have named it already."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    name = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
    scope.setdefault("state", {})["request_id"] = name.decode()

    async def named(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
        await send(message)

    return named
