"""HTTP client for one OpenAI-compatible endpoint: one streamed chat completion, with its timings.

Format: OpenAI's chat completions with server-sent events
(platform.openai.com/docs/api-reference/chat). `EndpointClient.ask` makes one attempt;
`tita.bench.worker_pool` retries.
"""

import asyncio
import codecs
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any, Self

import httpx
from httpx_sse import EventSource
from pydantic import SecretStr

from tita.bench.chat_response import (
    AttemptFailed,
    Reply,
    add_times,
    add_usage,
    choice_and_usage,
    has_changed_token,
    message_of,
    message_texts,
    parse_retry_after,
    server_message,
)  # fmt: skip
from tita.bench.outcomes import Outcome, describe, outcome_of
from tita.errors import ExitCode, TitaError
from tita.json_text import clean_text
from tita.proxies import without_proxy

_STATUS_TO_RETRY = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
_MAX_MESSAGE = 300
_DRAIN_S = 0.25
_DIGEST_HEADER = "x-tita-model-digest"
_LINKS_TIMEOUT_S = 5.0


class EndpointUnavailable(TitaError):
    """No connection to the endpoint."""

    exit_code = ExitCode.RETRY


class EndpointClient:
    """Client of one endpoint; an async context manager.

    Every request in flight has an HTTP client with one connection: httpx's pool looks at all of its
    connections several times per request, which takes longer than the request from 64 on.
    """

    def __init__(self, base_url: str, *, key: SecretStr | None, timeout_s: float) -> None:
        self.base_url = base_url
        self._key = key
        self._timeout_s = timeout_s
        self._with_usage = True
        self._headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._ssl = httpx.create_ssl_context()
        self._clients: list[httpx.AsyncClient] = []
        self._idle: list[httpx.AsyncClient] = []
        """The clients without a request; the one that was used last is used first."""

    async def __aenter__(self) -> Self:
        # The first request is sent at its time, not after the making of its client.
        self._idle.append(self._new_client())
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.aclose()

    @contextlib.contextmanager
    def _idle_client(self) -> Iterator[httpx.AsyncClient]:
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new_client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self._timeout_s, connect=min(self._timeout_s, 10.0))
        client = httpx.AsyncClient(
            headers=self._headers, timeout=timeout, verify=self._ssl,
            mounts=without_proxy(self.base_url),
        )  # fmt: skip
        self._clients.append(client)
        return client

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
        except httpx.DecodingError as error:
            raise AttemptFailed(f"not readable ({self._masked(str(error))})", retry=True) from None
        except httpx.InvalidURL as error:
            raise AttemptFailed(f"invalid URL ({error})", retry=False) from None

    async def _ask(self, body: Mapping[str, Any]) -> Reply:
        request = dict(body)
        if not (self._with_usage and request.get("stream")):
            request.pop("stream_options", None)
        sent_at, started = time.time(), time.perf_counter()
        url = f"{self.base_url}/chat/completions"
        with self._idle_client() as client:
            async with client.stream("POST", url, json=request) as response:
                if response.status_code in (400, 422) and "stream_options" in request:
                    message, param = server_message(await response.aread())
                    if "stream_options" in (param or message):
                        # Older servers reject the field; some send usage without it.
                        self._with_usage = False
                        return await self._ask(body)
                if response.status_code != 200:
                    raise self._status_error(response, await response.aread())
                pieces = response.aiter_bytes()
                head = await _read_head(pieces)
                if _is_event_stream(head, response.headers.get("content-type", "")):
                    reply = await self._read_stream(_sse_data(head, pieces), started=started)
                else:
                    reply = self._read_whole(head + b"".join([piece async for piece in pieces]))
                    reply.response_time_s = time.perf_counter() - started
        reply.sent_at = sent_at
        reply.model_digest = response.headers.get(_DIGEST_HEADER)
        length = len(reply.text)
        for name in ("text", "reasoning", "refusal"):
            setattr(reply, name, clean_text(getattr(reply, name)))
        if len(reply.text) != length:
            reply.changed = []  # its places are no longer those of the text
        if outcome_of(reply.text, finish_reason=reply.finish_reason) is Outcome.ERROR:
            raise AttemptFailed(
                f"{describe(Outcome.ERROR)} (finish_reason {reply.finish_reason})", retry=True
            )
        return reply

    async def _read_stream(self, stream: AsyncGenerator[str, None], *, started: float) -> Reply:
        reply, ended, has_choice = Reply(), False, False
        parts: list[str] = []
        length = 0
        is_changed = False
        place: int | None = None
        async with contextlib.aclosing(stream) as events:
            async for data in events:
                if data.strip() == "[DONE]":
                    ended = True
                    break
                choice, usage = choice_and_usage(self._json(data))
                self._raise_if_error(choice)
                has_choice = has_choice or bool(choice)
                add_usage(reply, usage)
                # Of several choices (`n`), the answer is the one that comes first.
                place = choice.get("index") if place is None else place
                if choice.get("index") not in (None, place):
                    continue
                message = choice.get("delta")
                if message is None and not length:
                    message = choice.get("message")  # the whole answer in one event
                delta = message_texts(message)
                # The text of a token may come with a later one.
                is_changed |= has_changed_token(choice)
                if not (delta.any_token or choice.get("finish_reason")):
                    continue
                now = time.perf_counter() - started
                add_times(reply, now, has_token=delta.any_token)
                if choice.get("finish_reason"):
                    reply.finish_reason = str(choice["finish_reason"])
                reply.reasoning += delta.reasoning
                reply.refusal += delta.refusal
                if delta.text:
                    parts.append(delta.text)
                    reply.arrivals.append((length, now))
                    if is_changed:
                        reply.changed.append((length, length + len(delta.text)))
                        is_changed = False
                    length += len(delta.text)
            reply.response_time_s = time.perf_counter() - started
            if not ended and reply.finish_reason is None:
                raise AttemptFailed("the stream ended before the answer was complete", retry=True)
            if not has_choice:
                raise AttemptFailed("not a chat completion: no choices", retry=True)
            # httpx reuses a connection only if the response was read to its end.
            with contextlib.suppress(TimeoutError, httpx.RequestError):
                async with asyncio.timeout(_DRAIN_S):
                    async for _ in events:
                        pass
        reply.text = "".join(parts)
        return reply

    def _read_whole(self, content: bytes) -> Reply:
        choice, usage = choice_and_usage(self._json(content.decode("utf-8", "replace")))
        self._raise_if_error(choice)
        if not isinstance(choice.get("message"), dict):
            raise AttemptFailed("not a chat completion: no message", retry=True)
        message = message_texts(choice["message"])
        reply = Reply(
            text=message.text,
            reasoning=message.reasoning,
            refusal=message.refusal,
            finish_reason=str(choice["finish_reason"]) if choice.get("finish_reason") else None,
        )
        add_usage(reply, usage)
        return reply

    def _raise_if_error(self, choice: Mapping[str, Any]) -> None:
        """Some gateways report the failure of a model inside of the choice, with status 200."""
        if choice.get("error"):
            raise AttemptFailed(
                f"error in the choice: {self._masked(message_of(choice))}", retry=True
            )

    def _json(self, text: str) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):  # or too many digits or brackets
            raise AttemptFailed(f"not JSON: {self._masked(text)[:80]!r}", retry=True) from None
        if not isinstance(event, dict):
            raise AttemptFailed("not a chat completion: not a JSON object", retry=True)
        if event.get("error"):
            raise AttemptFailed(self._masked(message_of(event)), retry=True)
        if "choices" not in event and not isinstance(event.get("usage"), dict):
            # Some gateways report errors in a format of their own, with status 200.
            what = self._masked(message_of(event))
            raise AttemptFailed(f"not a chat completion: no choices ({what})", retry=True)
        return event

    def _status_error(self, response: httpx.Response, content: bytes) -> AttemptFailed:
        message, param = server_message(content)
        if response.has_redirect_location:
            message = f"redirects to {response.headers['location']}"
        return AttemptFailed(
            f"HTTP {response.status_code}: {self._masked(message)}",
            retry=response.status_code in _STATUS_TO_RETRY,
            status=response.status_code,
            param=param,
            retry_after_s=parse_retry_after(response.headers.get("retry-after")),
        )

    def _masked(self, text: str) -> str:
        """`text` without the API key, which some servers repeat in the error message."""
        key = self._key.get_secret_value() if self._key else ""
        return (text.replace(key, "***") if key else text)[:_MAX_MESSAGE]


def http_get(url: str, *, key: SecretStr | None, timeout_s: float) -> httpx.Response:
    """One GET request.

    Raises:
        httpx.RequestError: it has no response.
        httpx.InvalidURL: the URL is not valid.
    """
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    with httpx.Client(headers=headers, timeout=timeout_s, mounts=without_proxy(url)) as client:
        return client.get(url)


def model_links(base_url: str, *, model_id: str, key: SecretStr | None) -> dict[str, str]:
    """The checkpoints behind a model as `GET /models` lists them; empty if it lists none.

    `tita serve` lists `base` and `reward`, each with its `source`, `sha256` and training `run`, and
    the `digest` that its answers carry. vLLM lists the path or name of the model as its `root`.
    """
    try:
        models = http_get(f"{base_url}/models", key=key, timeout_s=_LINKS_TIMEOUT_S).json()["data"]
        entry = next((e for e in models if isinstance(e, dict) and e.get("id") == model_id), {})
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return {}
    links = {"model_digest": entry.get("digest")}
    if not links["model_digest"]:
        links["model_root"] = entry.get("root")
    for role in ("base", "reward"):
        checkpoint = entry.get(role)
        if isinstance(checkpoint, dict):
            links[role] = checkpoint.get("source")
            links[f"{role}_sha256"] = checkpoint.get("sha256")
            links["run"] = checkpoint.get("run")  # The reward model's run wins: it comes last.
    rewards = entry.get("rewards")
    several = rewards if isinstance(rewards, dict) and len(rewards) > 1 else {}
    for name, checkpoint in several.items():
        if isinstance(checkpoint, dict):
            links[f"reward_{name}"] = checkpoint.get("source")
            links[f"reward_{name}_sha256"] = checkpoint.get("sha256")
    return {name: str(value) for name, value in links.items() if value}


_EVENT_LINES = (b"data:", b"event:", b"id:", b"retry:", b":")
_OTHER_LINES = (b"{", b"[", b"<")


async def _read_head(pieces: AsyncIterator[bytes]) -> bytes:
    """The first bytes of a body, without a byte order mark: enough to tell what it is."""
    head = b""
    async for piece in pieces:
        head += piece
        if len(head.lstrip()) >= 8:
            break
    return head.removeprefix(codecs.BOM_UTF8)


def _is_event_stream(head: bytes, content_type: str) -> bool:
    """Whether a body is a stream of server-sent events, which some servers declare as text."""
    head = head.lstrip()
    is_declared = "text/event-stream" in content_type and not head.startswith(_OTHER_LINES)
    return is_declared or head.startswith(_EVENT_LINES)


async def _sse_data(head: bytes, pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """The data of each server-sent event; events without data are skipped.

    Some endpoints omit the blank line after the last event or declare another charset. httpx-sse
    would drop that event and apply the charset, so it reads a copy of the response without either.
    """

    async def content() -> AsyncGenerator[bytes, None]:
        chunk = head
        yield chunk
        async for chunk in pieces:
            yield chunk
        if chunk.endswith(b"\n"):
            yield b"\n"

    copy = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=content())
    async for event in EventSource(copy).aiter_sse():
        if event.data:
            yield event.data
