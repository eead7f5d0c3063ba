"""What every request passes before its body is read: keys, size, and whether we still serve."""

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


class _TooLarge(Exception):
    pass


class Gate:
    """ASGI middleware; anything it refuses never reaches the application."""

    def __init__(
        self,
        app: Any,
        *,
        keys: Keys,
        max_body_bytes: int,
        closed: Callable[[], Refusal | None],
    ) -> None:
        """Args:
        app: the application behind.
        keys: those that are accepted.
        max_body_bytes: of a request.
        closed: why no new work is taken in right now, or None.
        """
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
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
            return self._too_large
        return None

    @property
    def _too_large(self) -> Refusal:
        message = f"the body has more than {self._max_body_bytes:,} bytes"
        return Refusal(message, status=413, code="body_too_large")

    def _knows(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        return self._keys.have(key.strip()) and scheme.lower() == b"bearer"

    async def _bounded(self, scope: Scope, receive: Any, send: Any) -> None:
        num_bytes = 0
        over = started = False

        async def counted() -> Any:
            nonlocal num_bytes, over
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                over = True
                raise _TooLarge
            return message

        async def noting(message: Any) -> None:
            nonlocal started
            # The framework takes our exception for broken JSON; its answer is not the right one.
            if over and not started:
                return
            started = True
            await send(message)

        with contextlib.suppress(_TooLarge):
            await self._app(scope, counted, noting)
        if over and not started:
            await self._too_large.response(scope["path"])(scope, receive, send)


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
