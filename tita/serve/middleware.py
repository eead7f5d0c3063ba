"""What every request passes before its body is read: keys, size, and whether we still serve."""

import asyncio
import contextlib
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tita.errors import TitaError
from tita.serve.errors import APIError
from tita.settings import settings

Scope = dict[str, Any]
OPEN_PATHS = frozenset(
    ("/", "/healthz", "/health", "/readyz", "/metrics", "/openapi.json", "/favicon.ico")
)


_ID = re.compile(rb"[\w.:-]{1,128}")


class APIKeys:
    """The keys that the server accepts; none for an open server.

    Those of a file are read again when it changes, as the Secrets of Kubernetes do under a running
    pod: the next request is held to the new ones. A file that has none any more, or cannot be read,
    leaves them as they were. It neither opens the server nor shuts out its clients.
    """

    def __init__(self, known: Sequence[str] = (), *, path: Path | None = None) -> None:
        """Args:
        known: keys, for ever.
        path: a file of keys instead, one a line or with commas between; `#` begins a remark.

        Raises:
            TitaError: the file has none.
        """
        self._path = path
        self._seen = _state(path) if path is not None else None
        self._known = _encoded(known if path is None else _read(path))

    @property
    def wanted(self) -> bool:
        """Whether a client needs one."""
        return bool(self._known)

    def have(self, key: bytes) -> bool:
        """Whether that is one of them."""
        self._look_again()
        # Every key is compared, in constant time: the time tells nothing about any of them.
        matches = [hmac.compare_digest(key, known) for known in self._known]
        return any(matches)

    def _look_again(self) -> None:
        if self._path is None or (state := _state(self._path)) == self._seen:
            return
        # Before it is read: what changes meanwhile is seen by the next request.
        self._seen = state
        try:
            known = _encoded(_read(self._path))
        except TitaError as error:
            logger.error("%s: %s; the API keys stay as they were", self._path, error.what)
            return
        if known != self._known:
            self._known = known
            logger.info("%s: read again; API keys that are accepted: %d", self._path, len(known))


def read_keys(path: Path | None) -> APIKeys:
    """The keys that the server is to accept.

    Args:
        path: a file of keys; TITA_API_KEYS, with commas between, if not given.

    Raises:
        TitaError: keys were named and there are none, which must not open the server.
    """
    if path is not None:
        return APIKeys(path=path)
    secret = settings().api_keys
    return APIKeys(
        () if secret is None else _keys(secret.get_secret_value(), where="TITA_API_KEYS")
    )


def _state(path: Path) -> tuple[int, ...] | None:
    """What differs once the file has changed, be it by a link on the way to it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        what = getattr(error, "strerror", None) or "no UTF-8"
        raise TitaError(what.lower(), where=str(path), remedy="name a file of keys") from None
    return _keys(text, where=str(path))


def _keys(text: str, *, where: str) -> tuple[str, ...]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = tuple(key.strip() for line in lines for key in line.split(",") if key.strip())
    if not found:
        raise TitaError("no key in it", where=where, remedy="add one, or leave it out")
    return found


def _encoded(keys: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(key.encode() for key in keys)


class _Refused(Exception):
    pass


class AuthMiddleware:
    """ASGI middleware; anything it refuses never reaches the application."""

    def __init__(
        self,
        app: Any,
        *,
        keys: APIKeys,
        max_body_bytes: int,
        body_within_s: float,
        closed: Callable[[], APIError | None],
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

    def _refusal(self, scope: Scope) -> APIError | None:
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith("/static/"):
            return None
        headers = dict(scope["headers"])
        if self._keys.wanted and not self._knows(headers.get(b"authorization", b"")):
            return APIError(
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
        self.refusal: APIError | None = None
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
            self.refusal = APIError(what, status=408, code="body_too_slow")
            raise _Refused from None
        self._whole = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.refusal = _too_large(self._max_bytes)
            raise _Refused
        return message


def _too_large(max_bytes: int) -> APIError:
    return APIError(
        f"the body has more than {max_bytes:,} bytes", status=413, code="body_too_large"
    )


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


logger = logging.getLogger(__name__)
