"""Refusals in the shape of OpenAI's error object (platform.openai.com/docs/guides/error-codes)."""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tita.serve.schemas import ErrorResponse

logger = logging.getLogger(__name__)

IN_OPENAPI: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}
"""What routes declare beside their answer."""

_MAX_MESSAGE = 1000
"""Characters."""

WORKER_PATH = "/worker_generate_stream"
"""LLaVA's clients read nothing but pieces of JSON from here, whatever the HTTP status."""


class APIError(Exception):
    """A request that gets no answer, and what its client is told."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        # What was sent is not sent back at length.
        self.message = encodable(message[:_MAX_MESSAGE])
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, path: str = "") -> Response:
        """What a client of `path` is told."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if path == WORKER_PATH:
            piece = worker_piece(self.message, error_code=1)
            return Response(piece, status_code=self.status, headers=headers)
        return JSONResponse(self.body, status_code=self.status, headers=headers)


def worker_piece(text: str, *, error_code: int) -> bytes:
    """One piece of a stream as LLaVA's worker sends it."""
    return json.dumps({"text": text, "error_code": error_code}).encode() + b"\0"


def overloaded() -> APIError:
    return APIError(
        "too many requests are waiting; try again soon",
        status=429, kind="rate_limit_error", code="queue_full", retry_after_s=1,
    )  # fmt: skip


def leaving() -> APIError:
    return APIError(
        "the server is shutting down",
        status=503, kind="server_error", code="shutting_down", retry_after_s=5,
    )  # fmt: skip


def loading() -> APIError:
    return APIError(
        "the models are still being loaded",
        status=503, kind="server_error", code="loading", retry_after_s=5,
    )  # fmt: skip


def too_late(deadline_s: float) -> APIError:
    return APIError(
        f"no complete answer within {deadline_s:g} s",
        status=504, kind="server_error", code="deadline_exceeded",
    )  # fmt: skip


def too_long(what: str) -> APIError:
    """The prompt is; said so that clients which look at the words, as LiteLLM does, know it."""
    return APIError(
        f"this model's maximum context length is exceeded: {what}",
        param="messages", code="context_length_exceeded",
    )  # fmt: skip


def broken() -> APIError:
    """Something of ours failed; what it was stands in the log, not in the answer."""
    return APIError("internal error", status=500, kind="server_error", code="internal_error")


def encodable(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def request_id(request: Request) -> str:
    """What the log, the answer's `id` and its `x-request-id` header call this request."""
    return str(getattr(request.state, "request_id", uuid.uuid4().hex))


def install(app: FastAPI) -> None:
    """Tell every failure of `app` in OpenAI's shape, and none with a traceback."""

    @app.exception_handler(APIError)
    async def _refusal(request: Request, refusal: APIError) -> Response:
        return refusal.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        refusal = _from_validation(error.errors(), body=error.body, media_type=kind)
        return refusal.response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        code = "not_found" if error.status_code == 404 else None
        message = f"{error.detail}: {request.method} {request.url.path}"
        refusal = APIError(message, status=error.status_code, code=code)
        response = refusal.response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        path = request.url.path
        logger.error("%s: %s %s failed", request_id(request), request.method, path, exc_info=error)
        return broken().response(path)


def _from_validation(
    errors: Sequence[Mapping[str, Any]], *, body: Any, media_type: str
) -> APIError:
    first = errors[0]
    if first["type"] == "json_invalid":
        return APIError("the body is no JSON", code="json_invalid")
    if isinstance(body, bytes):
        # What does not say that it is JSON is not read as such: any web page may send it.
        given = media_type.partition(";")[0][:100]
        message = f"the body comes as {given or 'nothing'}, not as application/json"
        return APIError(message, status=415, code="unsupported_media_type")
    if body is None:
        return APIError("a JSON object is expected as the body", code=str(first["type"]))
    where = _place(first, body)
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return APIError(message, param=where, code=str(first["type"]))


def _place(error: Mapping[str, Any], body: Any) -> str | None:
    """The client's own names on the way to an error; pydantic has tags of unions between them."""
    path, at = [], body
    for part in error["loc"][1:]:
        if part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int):
            path.append(str(part))
            at = at[part]
    if error["type"] == "missing":
        path.append(str(error["loc"][-1]))
    return ".".join(path) or None
