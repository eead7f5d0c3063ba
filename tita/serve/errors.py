"""Error responses in the format of OpenAI's error object.

Spec: platform.openai.com/docs/guides/error-codes.
"""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Response to a request that failed."""

    error: ErrorBody


OPENAPI_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}
"""Error responses that routes declare in the OpenAPI document."""

_MAX_MESSAGE_CHARACTERS = 1000

LLAVA_STREAM_PATH = "/worker_generate_stream"
"""LLaVA's clients parse every response of this path as stream chunks, whatever its HTTP status."""


@dataclass(eq=False)
class APIError(Exception):
    """An error that is returned to the client."""

    message: str
    _: KW_ONLY
    status: int = 400
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        # A message may quote the request, which can be long.
        self.message = replace_surrogates(self.message[:_MAX_MESSAGE_CHARACTERS])

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, path: str = "") -> Response:
        """The HTTP response to a request for `path`."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if path == LLAVA_STREAM_PATH:
            chunk = llava_chunk(self.message, error_code=1)
            kind = "application/octet-stream"
            return Response(chunk, status_code=self.status, headers=headers, media_type=kind)
        return JSONResponse(self.body, status_code=self.status, headers=headers)


def llava_chunk(text: str, *, error_code: int, **extra: str) -> bytes:
    """One chunk of a LLaVA worker's stream; its clients ignore further fields."""
    return json.dumps({"text": text, "error_code": error_code, **extra}).encode() + b"\0"


# Constructors of common errors, named after their `code`.
# fmt: off
queue_full = partial(
    APIError, "too many requests are waiting; try again soon",
    status=429, type="rate_limit_error", code="queue_full", retry_after_s=1)
shutting_down = partial(
    APIError, "the server is shutting down",
    status=503, type="server_error", code="shutting_down", retry_after_s=5)
loading = partial(
    APIError, "the models are still loading",
    status=503, type="server_error", code="loading", retry_after_s=5)
internal_error = partial(  # the cause is logged, not returned
    APIError, "internal error", status=500, type="server_error", code="internal_error")
# fmt: on


def deadline_exceeded(deadline_s: float) -> APIError:
    return APIError(
        f"the request did not finish within {deadline_s:g} s",
        status=504, type="server_error", code="deadline_exceeded",
    )  # fmt: skip


def model_not_found(name: str, *, served: Sequence[str]) -> APIError:
    return APIError(
        f"no model {name!r}; the models are {' and '.join(served)}",
        status=404, param="model", code="model_not_found",
    )  # fmt: skip


def context_length_exceeded(details: str, *, param: str) -> APIError:
    """The prompt is too long. LiteLLM recognizes this error by the words of its message."""
    return APIError(
        f"this model's maximum context length is exceeded: {details}",
        param=param, code="context_length_exceeded",
    )  # fmt: skip


def not_json() -> APIError:
    return APIError("the request body is not valid JSON", code="json_invalid")


def replace_surrogates(text: str) -> str:
    """The text without lone surrogates, which JSON can represent and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def request_id(request: Request) -> str:
    """The request's id in the log, in the response's `id` and in its `x-request-id` header."""
    found = getattr(request.state, "request_id", None)
    return uuid.uuid4().hex if found is None else str(found)


def install_handlers(app: FastAPI) -> None:
    """Return every error of `app` as an OpenAI error object, without a traceback."""

    @app.exception_handler(APIError)
    async def _api_error(request: Request, error: APIError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> Response:
        media_type = request.headers.get("content-type", "")
        api_error = _from_validation(error.errors(), body=error.body, media_type=media_type)
        return api_error.response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and str(error.detail).startswith("There was an error parsing"):
            # FastAPI's words for bodies that are not UTF-8, too deep, or have too long numbers.
            return not_json().response(request.url.path)
        code = "not_found" if error.status_code == 404 else None
        remedy = _route_remedy(request, error)
        message = f"{error.detail}: {request.method} {request.url.path}{remedy}"
        error_response = APIError(message, status=error.status_code, code=code)
        response = error_response.response(request.url.path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _unexpected_error(request: Request, error: Exception) -> Response:
        path = request.url.path
        logger.error("%s: %s %s failed", request_id(request), request.method, path, exc_info=error)
        return internal_error().response(path)


_OTHER_PATHS = {"/v1/responses": "/v1/chat/completions", "/v1/messages": "/v1/chat/completions"}
"""Paths of APIs that are not implemented, and what their clients can use."""


def _route_remedy(request: Request, error: HTTPException) -> str:
    """What to do about a path or a method that the server does not have."""
    if error.status_code == 405:
        return f"; use {allowed}" if (allowed := (error.headers or {}).get("Allow")) else ""
    if error.status_code != 404:
        return ""
    given = request.url.path
    # A base URL without /v1, or with too much.
    known = request.app.state.api_paths
    similar = [path for path in known if path.endswith(given) or given.endswith(path)]
    if meant := _OTHER_PATHS.get(given) or min(similar, key=len, default=""):
        return f"; use {meant}"
    return "; /openapi.json lists the paths"


_WORDS = {
    "model_attributes_type": "Input should be a JSON object",
    "union_tag_not_found": "Input should have a {discriminator}",
    "union_tag_invalid": "{discriminator} {tag!r} is not supported; use {expected_tags}",
}
"""Messages by kind of pydantic's error, with its fields."""


def _from_validation(
    errors: Sequence[Mapping[str, Any]], *, body: Any, media_type: str
) -> APIError:
    first = errors[0]
    if first["type"] == "json_invalid":
        return not_json()
    if isinstance(body, bytes):
        # FastAPI only parses bodies that declare JSON: any web page may send others (CSRF).
        given = media_type.partition(";")[0][:100] or "missing"
        message = f"content-type is {given}, expected application/json"
        return APIError(message, status=415, code="unsupported_media_type")
    if not isinstance(body, dict):
        return APIError("the request body must be a JSON object", code=str(first["type"]))
    param = _param(first, body)
    # Where the words are about pydantic's models.
    words = _WORDS.get(first["type"], "{msg}").format_map({**first, **first.get("ctx", {})})
    message = f"{param}: {words}" if param else words
    return APIError(message, param=param, code=str(first["type"]))


def _param(error: Mapping[str, Any], body: Any) -> str | None:
    """Path of the invalid field in the body, without the union tags that pydantic inserts."""
    path, at = [], body
    for part in error["loc"][1:]:
        if part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int):
            path.append(str(part))
            at = at[part]
    if error["type"] == "missing":
        path.append(str(error["loc"][-1]))
    return ".".join(path) or None
