"""ASGI middleware: API keys, request ids, body limits, and rejection while not ready."""

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tita.serve.api_keys import KEY_WEIGHTS, APIKeys
from tita.serve.errors import APIError

Scope = dict[str, Any]

PUBLIC_PATHS = frozenset(
    ("/", "/healthz", "/health", "/readyz", "/metrics", "/openapi.json", "/favicon.ico")
)
"""Paths that need no API key, as does everything below `/static/`."""
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
_ABSOLUTE = re.compile("https?://(?:[^/]*@)?(?P<host>[^/@]+)", re.IGNORECASE)
_SMALL_BODY = 256 * 1024
"""Bytes of a body that are received without waiting for a turn: one read of asyncio."""
_PARTS_PER_TICK = 1


class _BodyRejected(Exception):
    pass


@dataclass(slots=True)
class BodyBudget:
    """The bodies that are held at a time: received, and not answered or read by the engine yet."""

    max_bytes: int
    num_bytes: int = 0

    def take(self, num_bytes: int) -> bool:
        """Take a part for received bytes; False if it is more than what is left."""
        if self.num_bytes + num_bytes > self.max_bytes:
            return False
        self.num_bytes += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes

    @property
    def error(self) -> APIError:
        return APIError(
            f"the requests in progress have more than {self.max_bytes:,} bytes; try again soon",
            status=429, type="rate_limit_error", code="bodies_too_large", retry_after_s=1,
        )  # fmt: skip


class BodyTurns:
    """Parts of large bodies take turns, so that small requests are read and answered meanwhile.

    Without turns, each tick of the event loop would read a part of every large body that arrives,
    and a small request needs several ticks. Slow clients hold no turn while they are waited for.
    """

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_PARTS_PER_TICK)

    async def next(self, num_bytes: int) -> None:
        """Wait for the turn of a body of which `num_bytes` have been received."""
        if num_bytes >= _SMALL_BODY:
            await self._turns.acquire()
            asyncio.get_running_loop().call_soon(self._turns.release)


@dataclass(frozen=True, slots=True)
class AuthMiddleware:
    """Authenticates requests, assigns request ids and enforces the limits on bodies.

    A rejected request does not reach the application.
    """

    app: Any
    keys: APIKeys
    max_body_bytes: int
    body_timeout_s: float
    root_path: str
    """Removed from the paths of requests; empty for none."""
    bodies: BodyBudget
    turns: BodyTurns
    unavailable: Callable[[], APIError | None]
    """Returns the error for new work while the server is not ready, else None."""
    count_refusal: Callable[[int], None]
    """Called with the error status of each request that gets one, probes excepted."""

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _normalized(scope, root_path=self.root_path)
        send = self._mark_response(scope, send)
        error = self._check(scope)
        if error is not None:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._call_with_limits(scope, receive, send)

    def _check(self, scope: Scope) -> APIError | None:
        path = scope["path"]
        if _is_public(path):
            return None
        headers = dict(scope["headers"])
        if self.keys.required:
            weights = self._authenticate(headers.get(b"authorization", b""))
            if weights is None:
                return APIError(
                    "missing or invalid API key; send 'Authorization: Bearer KEY'",
                    status=401, type="authentication_error", code="invalid_api_key",
                )  # fmt: skip
            KEY_WEIGHTS.set(weights)
        if scope["method"] == "POST" and (error := self.unavailable()):
            return error
        coding = headers.get(b"content-encoding", b"").strip().lower()
        if coding not in (b"", b"identity"):
            # Its size once decoded would be unknown.
            name = coding[:100].decode("latin-1")
            return APIError(
                f"content-encoding {name} is not supported; send the body as it is",
                status=415, code="unsupported_media_type",
            )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return None
        # Python refuses to parse numbers of thousands of digits.
        num_bytes = int(length) if len(length) <= 18 else 10**18
        if error := self._too_large(num_bytes):
            return error
        if self.bodies.num_bytes + num_bytes > self.bodies.max_bytes:
            return self.bodies.error
        return None

    def _too_large(self, num_bytes: int) -> APIError | None:
        """The error for a body that is never accepted, even if it is the only one."""
        max_bytes, option = min(
            (self.max_body_bytes, "--max-body-mib"), (self.bodies.max_bytes, "--max-bodies-mib")
        )
        if num_bytes <= max_bytes:
            return None
        message = f"the request body is larger than {max_bytes:,} bytes ({option})"
        return APIError(message, status=413, code="body_too_large")

    def _authenticate(self, header: bytes) -> Mapping[str, float] | None:
        """The default weights of the key in a header; None without a valid one."""
        scheme, _, key = header.partition(b" ")
        weights = self.keys.find(key.strip())
        return weights if scheme.lower() == b"bearer" else None

    def _mark_response(self, scope: Scope, send: Any) -> Any:
        """Put the request's id, the client's own if it is valid, into `state` and the response.

        Responses with the status of an error are counted.
        """
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = name.decode()
        is_counted = not _is_public(scope["path"])

        # One function for both: it is called for each part of a stream.
        async def send_marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                if is_counted and message["status"] >= 400:
                    self.count_refusal(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        return send_marked

    async def _call_with_limits(self, scope: Scope, receive: Any, send: Any) -> None:
        """Call the application, and limit the size of the body and the time for receiving it."""
        deadline: float | None = asyncio.get_running_loop().time() + self.body_timeout_s
        num_bytes, num_held, started = 0, 0, False
        error: APIError | None = None

        async def receive_within_limits() -> Any:
            nonlocal deadline, num_bytes, num_held, error
            try:
                async with asyncio.timeout_at(deadline):
                    if deadline is not None:
                        await self.turns.next(num_bytes)
                    message = await receive()
            except TimeoutError:
                what = f"the request body did not arrive within {self.body_timeout_s:g} s"
                error = APIError(what, status=408, code="body_too_slow")
                raise _BodyRejected from None
            if not message.get("more_body", False):
                deadline = None  # the next message is the client's disconnect
            num_bytes += len(message.get("body", b""))
            if too_large := self._too_large(num_bytes):
                error = too_large
                raise _BodyRejected
            if not self.bodies.take(len(message.get("body", b""))):
                error = self.bodies.error
                raise _BodyRejected
            num_held += len(message.get("body", b""))
            return message

        async def send_unless_rejected(message: Any) -> None:
            nonlocal num_held, started
            # FastAPI reports _BodyRejected as invalid JSON; that response is discarded.
            if error and not started:
                return
            if not started:
                # A stream starts when its request is in the queue, with its images decoded.
                self.bodies.give_back(num_held)
                num_held = 0
            started = True
            await send(message)

        try:
            with contextlib.suppress(_BodyRejected):
                await self.app(scope, receive_within_limits, send_unless_rejected)
        finally:
            self.bodies.give_back(num_held)
        if error and not started:
            response = error.response(scope["path"])
            # The rest of the body is not read.
            response.headers["connection"] = "close"
            await response(scope, receive, send)


def _is_public(path: str) -> bool:
    return path in PUBLIC_PATHS or path.startswith("/static/")


def _normalized(scope: Scope, *, root_path: str) -> Scope:
    """HEAD is handled as GET (uvicorn drops the body; RFC 9110, 9.3.2).

    A trailing slash is cut, and so is the root path. Of an absolute URL, as a client sends it to a
    proxy, the host counts instead of the header's (RFC 9112, 3.2.2).
    """
    method, path, headers = scope["method"], scope["path"], scope["headers"]
    if absolute := _ABSOLUTE.match(path):
        path = path[absolute.end() :]
        host = absolute["host"].encode("ascii", "replace")
        headers = [(b"host", host), *(each for each in headers if each[0] != b"host")]
    # Some proxies leave the prefix under which they serve the server in the path.
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        path = path[len(root_path) :]
    return scope | {
        "method": "GET" if method == "HEAD" else method,
        "path": path.rstrip("/") or "/",
        "headers": headers,
    }
