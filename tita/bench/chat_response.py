"""Chat completions as they arrive: texts, reasoning, token counts, timings, and error bodies.

Format: OpenAI's chat completions (platform.openai.com/docs/api-reference/chat) and what vLLM,
SGLang, OpenRouter and Mistral send beyond it.
"""

import bisect
import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

_PLAIN_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class AttemptFailed(Exception):
    """One attempt ended without a complete answer."""

    def __init__(
        self,
        message: str,
        *,
        retry: bool,
        status: int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.retry = retry
        self.status = status
        self.param = param
        """The field of the request that the endpoint complains about, if it names one."""
        self.retry_after_s = retry_after_s


@dataclass(slots=True, kw_only=True)
class Reply:
    """A response with its token counts and timings; None where the endpoint reports none.

    Times named `_s` are seconds after the request was sent.
    """

    text: str = ""
    reasoning: str = ""
    """Reasoning that the endpoint separates from the text (`reasoning`, `reasoning_content`)."""
    refusal: str = ""
    finish_reason: str | None = None
    model_digest: str | None = None
    """Digest of the models behind the answer, as `tita serve` reports it."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    """Fields of the usage block other than OpenAI's three counts."""
    sent_at: float | None = None
    """When the request was sent, in seconds since the epoch."""
    response_time_s: float = 0.0
    """To the last byte of the response, a late usage block included."""
    first_token_s: float | None = None
    """To the first token of any kind: text, reasoning, refusal or a tool call."""
    last_token_s: float | None = None
    """To the last token, or to the event with the finish reason."""
    longest_gap_s: float | None = None
    """Longest time between two events with tokens."""
    arrivals: list[tuple[int, float]] = field(default_factory=list)
    """(offset in `text`, time) of each piece of a streamed text."""
    changed: list[tuple[int, int]] = field(default_factory=list)
    """Start and end in `text` of tokens that guidance changed, if the request asked for `explain`
    of `tita serve`."""

    @property
    def per_token_s(self) -> float | None:
        """Seconds per output token after the first; None without a stream or below two tokens."""
        if self.first_token_s is None or self.last_token_s is None or not self.output_tokens:
            return None
        if self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    def arrival_s(self, offset: int) -> float | None:
        """When the character at `offset` of the text arrived; None without a stream."""
        index = bisect.bisect_right(self.arrivals, offset, key=lambda piece: piece[0]) - 1
        return self.arrivals[index][1] if index >= 0 and offset < len(self.text) else None


def choice_and_usage(event: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice and the usage block of a response or event; empty where it has none.

    Raises:
        AttemptFailed: it has neither.
    """
    choices, usage = event.get("choices"), event.get("usage")
    if choices is None and isinstance(usage, dict):
        return {}, usage
    if not isinstance(choices, list) or (choices and not isinstance(choices[0], dict)):
        raise AttemptFailed("not a chat completion: no choices", retry=True)
    return (choices[0] if choices else {}), (usage if isinstance(usage, dict) else {})


@dataclass(frozen=True, slots=True)
class MessageTexts:
    """The texts of one message or delta."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    has_tool_calls: bool = False

    @property
    def any_token(self) -> bool:
        """Whether the delta has a token of any kind."""
        return bool(self.text or self.reasoning or self.refusal or self.has_tool_calls)


def message_texts(message: Any) -> MessageTexts:
    """The texts of a message or delta.

    vLLM and OpenRouter send reasoning as `reasoning`, DeepSeek and SGLang as `reasoning_content`,
    Mistral as a part of `content`, which is then a list of parts.
    """
    if not isinstance(message, dict):
        return MessageTexts()
    text, reasoning, refusal = _content_texts(message.get("content"))
    for name in ("reasoning", "reasoning_content"):
        value = message.get(name)
        if isinstance(value, str) and value:
            reasoning += value
            break
    value = message.get("refusal")
    refusal += value if isinstance(value, str) else ""
    has_tool_calls = bool(message.get("tool_calls") or message.get("function_call"))
    return MessageTexts(text, reasoning, refusal, has_tool_calls)


def _content_texts(content: Any) -> tuple[str, str, str]:
    """(text, reasoning, refusal) of a `content`: a string, a list of parts, or a part."""
    if isinstance(content, str):
        return content, "", ""
    found = {"text": "", "reasoning": "", "refusal": ""}
    for part in content if isinstance(content, list) else (content,):
        if isinstance(part, str):
            found["text"] += part
        elif isinstance(part, dict):
            kind = str(part.get("type", "text"))
            value = part.get("text") or part.get(kind) or ""
            kind = {"output_text": "text", "thinking": "reasoning"}.get(kind, kind)
            if kind in found:
                found[kind] += _content_texts(value)[0]
    return found["text"], found["reasoning"], found["refusal"]


def add_times(reply: Reply, now: float, *, has_token: bool) -> None:
    """Add the time of an event with a token or the finish reason, in seconds after sending."""
    if has_token and reply.first_token_s is None:
        reply.first_token_s = now
    elif has_token and reply.last_token_s is not None:
        reply.longest_gap_s = max(reply.longest_gap_s or 0.0, now - reply.last_token_s)
    reply.last_token_s = now


def has_changed_token(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of `tita serve` with `explain` has a token that guidance changed."""
    explained = choice.get("explain")
    return isinstance(explained, list) and any(
        isinstance(token, dict) and token.get("changed") for token in explained
    )


def add_usage(reply: Reply, usage: Mapping[str, Any]) -> None:
    """Set the token counts of a reply from a usage block; the last block counts."""
    if not usage:
        return
    reply.input_tokens, reply.output_tokens, reply.total_tokens = (
        _count(usage.get(key)) for key in _PLAIN_USAGE
    )
    reply.usage = {
        key: value for key, value in usage.items() if key not in _PLAIN_USAGE and value is not None
    }


def _count(value: Any) -> int | None:
    """A number of tokens; None if it is none, such as -1 for a number that is not known."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and value >= 0 else None


def server_message(content: bytes) -> tuple[str, str | None]:
    """The message of an error body, and the field of the request that it names in `param`."""
    text = content.decode("utf-8", "replace")
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split()) or "no message", None
    if isinstance(event, list) and len(event) == 1:
        event = event[0]  # as Google's API sends errors
    if not isinstance(event, dict):
        return text, None
    error = event.get("error")
    param = error.get("param") if isinstance(error, dict) else event.get("param")
    detail = event.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        # FastAPI: [{"loc": ["body", "max_tokens"], "msg": ...}, ...]
        param = next((str(name) for name in detail[0].get("loc") or () if name != "body"), None)
    return message_of(event), param if isinstance(param, str) else None


def message_of(event: Mapping[str, Any]) -> str:
    """The message of OpenAI's `{"error": {"message": ...}}` and similar error bodies."""
    error = event.get("error", event)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return " ".join(str(error).split())


def parse_retry_after(value: str | None) -> float | None:
    """A Retry-After header in seconds; the value is a number or a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    with contextlib.suppress(ValueError):
        # Whole seconds by the standard; some gateways send fractions.
        seconds = float(value)
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
