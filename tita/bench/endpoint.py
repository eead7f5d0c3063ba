"""HTTP client for one OpenAI-compatible endpoint: one streamed chat completion, with its timings.

Format: OpenAI's chat completions with server-sent events
(platform.openai.com/docs/api-reference/chat). `EndpointClient.ask` makes one attempt;
`tita.bench.worker_pool` retries.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx
from httpx_sse import EventSource
from pydantic import SecretStr

from tita.errors import ExitCode, TitaError

_STATUS_TO_RETRY = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
_MAX_MESSAGE = 300
_DRAIN_S = 0.25
_LINKS_TIMEOUT_S = 5.0
_PLAIN_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class EndpointUnavailable(TitaError):
    """No connection to the endpoint."""

    exit_code = ExitCode.RETRY


class AttemptFailed(Exception):
    """One attempt ended without a complete answer."""

    def __init__(
        self,
        message: str,
        *,
        retry: bool,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.retry = retry
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(slots=True, kw_only=True)
class Reply:
    """An answer with its token counts and timings; None where the endpoint reports none."""

    text: str = ""
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    """Fields of the usage block other than OpenAI's three counts."""
    response_time_s: float = 0.0
    """From sending the request to the last byte of the answer."""
    first_token_s: float | None = None

    @property
    def per_token_s(self) -> float | None:
        """Seconds per output token after the first; None without a stream or below two tokens."""
        if self.first_token_s is None or not self.output_tokens or self.output_tokens < 2:
            return None
        return (self.response_time_s - self.first_token_s) / (self.output_tokens - 1)


class EndpointClient:
    """Client of one endpoint; an async context manager."""

    def __init__(
        self, base_url: str, *, key: SecretStr | None, timeout_s: float, concurrency: int
    ) -> None:
        self.base_url = base_url
        self._key = key
        self._timeout_s = timeout_s
        self._with_usage = True
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Send one chat completions request and read its stream to the end.

        Raises:
            AttemptFailed: no complete answer within the timeout.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask(body)
        except TimeoutError:
            raise AttemptFailed(f"no answer within {self._timeout_s:g} s", retry=True) from None
        except httpx.TransportError as error:
            reason = self._masked(str(error)) or type(error).__name__
            raise AttemptFailed(f"connection failed ({reason})", retry=True) from None
        except httpx.InvalidURL as error:
            raise AttemptFailed(f"invalid URL ({error})", retry=False) from None

    async def _ask(self, body: Mapping[str, Any]) -> Reply:
        request = {**body, "stream": True}
        if self._with_usage:
            request["stream_options"] = {"include_usage": True}
        started = time.perf_counter()
        async with self._client.stream(
            "POST", f"{self.base_url}/chat/completions", json=request
        ) as response:
            if response.status_code == 400 and "stream_options" in request:
                message = _server_message(await response.aread())
                if "stream_options" in message:
                    # Older servers reject the field; some send usage without it.
                    self._with_usage = False
                    return await self._ask(body)
            if response.status_code != 200:
                raise self._status_error(response, await response.aread())
            if "text/event-stream" in response.headers.get("content-type", ""):
                reply = await self._read_stream(response, started=started)
            else:
                reply = self._read_whole(await response.aread())
                reply.response_time_s = time.perf_counter() - started
        return reply

    async def _read_stream(self, response: httpx.Response, *, started: float) -> Reply:
        reply, parts, ended = Reply(), [], False
        async with contextlib.aclosing(_sse_data(response)) as events:
            async for data in events:
                if data == "[DONE]":
                    ended = True
                    break
                text, has_reasoning = self._read_event(data, reply=reply)
                if (text or has_reasoning) and reply.first_token_s is None:
                    reply.first_token_s = time.perf_counter() - started
                parts.append(text)
            reply.response_time_s = time.perf_counter() - started
            if not ended and reply.finish_reason is None:
                raise AttemptFailed("the stream ended before the answer was complete", retry=True)
            # httpx reuses a connection only if the response was read to its end.
            with contextlib.suppress(TimeoutError, httpx.TransportError):
                async with asyncio.timeout(_DRAIN_S):
                    async for _ in events:
                        pass
        reply.text = "".join(parts)
        return reply

    def _read_event(self, data: str, *, reply: Reply) -> tuple[str, bool]:
        """Add one event to `reply`; returns its text, and whether it has reasoning content."""
        choice, usage = _choice_and_usage(self._json(data))
        _add_usage(reply, usage)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = {}
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
        text = delta.get("content")
        return (text if isinstance(text, str) else ""), bool(delta.get("reasoning_content"))

    def _read_whole(self, content: bytes) -> Reply:
        choice, usage = _choice_and_usage(self._json(content.decode("utf-8", "replace")))
        message = choice.get("message")
        if not isinstance(message, dict):
            raise AttemptFailed("not a chat completion: no message", retry=True)
        reply = Reply(text=message.get("content") or "", finish_reason=choice.get("finish_reason"))
        _add_usage(reply, usage)
        return reply

    def _json(self, text: str) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except json.JSONDecodeError:
            raise AttemptFailed(f"not JSON: {self._masked(text)[:80]!r}", retry=True) from None
        if not isinstance(event, dict):
            raise AttemptFailed("not a chat completion: not a JSON object", retry=True)
        if event.get("error"):
            raise AttemptFailed(self._masked(_message_of(event)), retry=True)
        return event

    def _status_error(self, response: httpx.Response, content: bytes) -> AttemptFailed:
        message = self._masked(_server_message(content))
        return AttemptFailed(
            f"HTTP {response.status_code}: {message}",
            retry=response.status_code in _STATUS_TO_RETRY,
            status=response.status_code,
            retry_after_s=_retry_after_s(response.headers.get("retry-after")),
        )

    def _masked(self, text: str) -> str:
        """`text` without the API key, which some servers repeat in the error message."""
        key = self._key.get_secret_value() if self._key else ""
        return (text.replace(key, "***") if key else text)[:_MAX_MESSAGE]


def model_links(base_url: str, *, model_id: str, key: SecretStr | None) -> dict[str, str]:
    """The checkpoints behind a model as `GET /models` lists them; empty if it lists none.

    `tita serve` lists `base` and `reward`, each with its `source`, `sha256` and training `run`.
    """
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    try:
        answer = httpx.get(f"{base_url}/models", headers=headers, timeout=_LINKS_TIMEOUT_S)
        models = answer.json()["data"]
        entry = next((e for e in models if isinstance(e, dict) and e.get("id") == model_id), {})
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return {}
    links = {}
    for role in ("base", "reward"):
        checkpoint = entry.get(role)
        if isinstance(checkpoint, dict):
            links[role] = checkpoint.get("source")
            links[f"{role}_sha256"] = checkpoint.get("sha256")
            links["run"] = checkpoint.get("run")  # The reward model's run wins: it comes last.
    return {name: str(value) for name, value in links.items() if value}


async def _sse_data(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The data of each server-sent event; events without data are skipped.

    Some endpoints omit the blank line after the last event or declare another charset. httpx-sse
    would drop that event and apply the charset, so it reads a copy of the response without either.
    """

    async def content() -> AsyncGenerator[bytes, None]:
        chunk = b""
        async for chunk in response.aiter_bytes():
            yield chunk
        if chunk.endswith(b"\n"):
            yield b"\n"

    copy = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=content())
    async for event in EventSource(copy).aiter_sse():
        if event.data:
            yield event.data


def _choice_and_usage(event: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    choices, usage = event.get("choices"), event.get("usage")
    if not isinstance(choices, list) or (choices and not isinstance(choices[0], dict)):
        raise AttemptFailed("not a chat completion: no choices", retry=True)
    return (choices[0] if choices else {}), (usage if isinstance(usage, dict) else {})


def _add_usage(reply: Reply, usage: Mapping[str, Any]) -> None:
    if not usage:
        return
    reply.input_tokens, reply.output_tokens, reply.total_tokens = (
        value if isinstance(value := usage.get(key), int) else None for key in _PLAIN_USAGE
    )
    reply.usage = {
        key: value for key, value in usage.items() if key not in _PLAIN_USAGE and value is not None
    }


def _server_message(content: bytes) -> str:
    text = content.decode("utf-8", "replace")
    try:
        event = json.loads(text)
    except json.JSONDecodeError:
        return " ".join(text.split()) or "no message"
    return _message_of(event) if isinstance(event, dict) else text


def _message_of(event: Mapping[str, Any]) -> str:
    """The message of OpenAI's `{"error": {"message": ...}}` and similar error bodies."""
    error = event.get("error", event)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return " ".join(str(error).split())


def _retry_after_s(value: str | None) -> float | None:
    """A Retry-After header in seconds; the value is a number or a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
