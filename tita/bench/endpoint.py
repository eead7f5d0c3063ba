"""One question to one OpenAI-compatible endpoint: stream the answer, take the times.

The wire format is OpenAI's chat completions with server-sent events
(platform.openai.com/docs/api-reference/chat). One call here is one attempt;
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
from typing import Any

import httpx
from pydantic import SecretStr

from tita.errors import ExitCode, TitaError

_STATUS_TO_RETRY = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
_MAX_MESSAGE = 300
_DRAIN_S = 0.25
_LINKS_TIMEOUT_S = 5.0
_PLAIN_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class EndpointUnavailable(TitaError):
    """The endpoint answers nobody."""

    exit_code = ExitCode.RETRY


class AttemptFailed(Exception):
    """One attempt brought no answer."""

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
    """An answer with its tokens and times; None where the endpoint did not say."""

    text: str = ""
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    """What the usage block says beyond OpenAI's three counts."""
    response_time_s: float = 0.0
    """From sending the request to the last byte of the answer."""
    first_token_s: float | None = None

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first; None without a stream or below two tokens."""
        if self.first_token_s is None or not self.output_tokens or self.output_tokens < 2:
            return None
        return (self.response_time_s - self.first_token_s) / (self.output_tokens - 1)


class EndpointClient:
    """An endpoint under one base URL; use it as an async context manager."""

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

    async def __aenter__(self) -> "EndpointClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Send one chat completion and read its stream to the end.

        Raises:
            AttemptFailed: no complete answer came within the time limit.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask(body)
        except TimeoutError:
            raise AttemptFailed(f"no answer within {self._timeout_s:g} s", retry=True) from None
        except httpx.TransportError as error:
            what = self._masked(str(error)) or type(error).__name__
            raise AttemptFailed(f"connection failed ({what})", retry=True) from None
        except httpx.InvalidURL as error:
            raise AttemptFailed(f"no such address ({error})", retry=False) from None

    async def _ask(self, body: Mapping[str, Any]) -> Reply:
        wanted = {**body, "stream": True}
        if self._with_usage:
            wanted["stream_options"] = {"include_usage": True}
        started = time.perf_counter()
        async with self._client.stream(
            "POST", f"{self.base_url}/chat/completions", json=wanted
        ) as response:
            if response.status_code == 400 and "stream_options" in wanted:
                message = _server_message(await response.aread())
                if "stream_options" in message:
                    # Older servers do not know it; they may still send usage by themselves.
                    self._with_usage = False
                    return await self._ask(body)
            if response.status_code != 200:
                raise self._refusal(response, await response.aread())
            if "text/event-stream" in response.headers.get("content-type", ""):
                reply = await self._read_stream(response, started=started)
            else:
                reply = self._read_whole(await response.aread())
                reply.response_time_s = time.perf_counter() - started
        return reply

    async def _read_stream(self, response: httpx.Response, *, started: float) -> Reply:
        reply, parts, ended = Reply(), [], False
        async with contextlib.aclosing(_events(response)) as events:
            async for data in events:
                if data == "[DONE]":
                    ended = True
                    break
                said, thought = self._read_event(data, reply=reply)
                if (said or thought) and reply.first_token_s is None:
                    reply.first_token_s = time.perf_counter() - started
                parts.append(said)
            reply.response_time_s = time.perf_counter() - started
            if not ended and reply.finish_reason is None:
                raise AttemptFailed("the stream broke off", retry=True)
            # A connection is used again only if it was read to its end, which should be here.
            with contextlib.suppress(TimeoutError, httpx.TransportError):
                async with asyncio.timeout(_DRAIN_S):
                    async for _ in events:
                        pass
        reply.text = "".join(parts)
        return reply

    def _read_event(self, data: str, *, reply: Reply) -> tuple[str, bool]:
        """Add one event to `reply`; returns its text, and whether it had hidden reasoning."""
        choice, usage = _choice_and_usage(self._json(data))
        _add_usage(reply, usage)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = {}
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
        said = delta.get("content")
        return (said if isinstance(said, str) else ""), bool(delta.get("reasoning_content"))

    def _read_whole(self, content: bytes) -> Reply:
        choice, usage = _choice_and_usage(self._json(content.decode("utf-8", "replace")))
        message = choice.get("message")
        if not isinstance(message, dict):
            raise AttemptFailed("not a chat completion: no message in it", retry=True)
        reply = Reply(text=message.get("content") or "", finish_reason=choice.get("finish_reason"))
        _add_usage(reply, usage)
        return reply

    def _json(self, text: str) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except json.JSONDecodeError:
            raise AttemptFailed(f"not JSON: {self._masked(text)[:80]!r}", retry=True) from None
        if not isinstance(event, dict):
            raise AttemptFailed("not a chat completion: no object", retry=True)
        if event.get("error"):
            raise AttemptFailed(self._masked(_message_of(event)), retry=True)
        return event

    def _refusal(self, response: httpx.Response, content: bytes) -> AttemptFailed:
        message = self._masked(_server_message(content))
        return AttemptFailed(
            f"HTTP {response.status_code}: {message}",
            retry=response.status_code in _STATUS_TO_RETRY,
            status=response.status_code,
            retry_after_s=_retry_after_s(response.headers.get("retry-after")),
        )

    def _masked(self, text: str) -> str:
        """`text` fit for a results file: some servers repeat the key that they refuse."""
        key = self._key.get_secret_value() if self._key else ""
        return (text.replace(key, "***") if key else text)[:_MAX_MESSAGE]


def model_links(base_url: str, *, model_id: str, key: SecretStr | None) -> dict[str, str]:
    """Where the endpoint's list of models says a model came from; nothing if it says nothing.

    Our own server names the checkpoints `base` and `reward` there, each with its `source`, `sha256`
    and the training `run` that made it; others need not know the address at all.
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
            links["run"] = checkpoint.get("run")  # the reward model's, which comes last
    return {name: str(value) for name, value in links.items() if value}


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The data of each server-sent event (html.spec.whatwg.org, section 9.2).

    Lines end at LF or CRLF. httpx's own lines would end at U+2028 and the like too, which may stand
    unescaped in an answer.
    """
    data: list[str] = []
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if text.startswith("data:"):
                data.append(text[5:].removeprefix(" "))
            elif not text and data:
                yield "\n".join(data)
                data = []
    # A last line without its end is cut off, and an event without its blank line may be.
    if data:
        yield "\n".join(data)


def _choice_and_usage(event: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    choices, usage = event.get("choices"), event.get("usage")
    if not isinstance(choices, list) or (choices and not isinstance(choices[0], dict)):
        raise AttemptFailed("not a chat completion: no choices in it", retry=True)
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
    """The message in OpenAI's `{"error": {"message": ...}}` and its relatives."""
    error = event.get("error", event)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return " ".join(str(error).split())


def _retry_after_s(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number or a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
