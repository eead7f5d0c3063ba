"""`/v1/chat/completions`: OpenAI's chat completions, whole and as a stream."""

import json
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from tita.align import Said
from tita.serve import failures
from tita.serve.asking import asked_from, check
from tita.serve.failures import Refusal, request_id
from tita.serve.schemas import (
    Answered,
    ChatRequest,
    ChatResponse,
    Choice,
    ExplainedToken,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from tita.serve.serving import Serving
from tita.serve.streaming import HungUp, Stream, unless_hung_up
from tita.serve.tickets import Pending

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What a request has cost so far."""

    num_prompt_tokens: int
    num_tokens: int = 0
    num_changed: int = 0
    base_s: float = 0.0
    reward_s: float = 0.0

    def add(self, said: Said) -> None:
        self.num_tokens += said.counted
        self.num_changed += said.changed
        self.base_s += said.base_s
        self.reward_s += said.reward_s

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_tokens,
            total_tokens=self.num_prompt_tokens + self.num_tokens,
            changed_tokens=self.num_changed,
            base_ms=round(self.base_s * 1000, 3),
            reward_ms=round(self.reward_s * 1000, 3),
        )


@dataclass(slots=True)
class _Written:
    text: list[str] = field(default_factory=list)
    steps: list[Said] = field(default_factory=list)


class _Chat:
    """One chat completion on its way out."""

    def __init__(self, body: ChatRequest, pending: Pending, *, name: str, fingerprint: str) -> None:
        self.id = f"chatcmpl-{name}"
        self.created = int(time.time())
        self.body = body
        self.pending = pending
        self.fingerprint = fingerprint
        self.tally = _Tally(num_prompt_tokens=pending.tickets[0].prepared.num_prompt_tokens)

    async def whole(self) -> ChatResponse:
        written = [_Written() for _ in self.pending.tickets]
        async for index, said in self.pending.said():
            self.tally.add(said)
            written[index].text.append(said.text)
            written[index].steps.append(said)
        self._log()
        choices = [
            Choice(
                index=index,
                message=Answered(content="".join(each.text).rstrip()),
                finish_reason=each.steps[-1].finish_reason or "stop",
                logprobs=self._logprobs(each.steps),
                explain=self._explained(each.steps),
            )
            for index, each in enumerate(written)
        ]
        return ChatResponse(
            id=self.id,
            created=self.created,
            model=self.body.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=self.tally.usage,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; a failure after the first is an event, too."""
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        said_steps = self.pending.said()
        try:
            for index in range(len(self.pending.tickets)):
                yield self._event(index, {"role": "assistant", "content": ""}, wants_usage)
            async for index, said in said_steps:
                self.tally.add(said)
                detailed = said.counted and (self.body.explain or self.body.logprobs)
                if said.text or said.finish_reason or detailed:
                    delta = {"content": said.text} if said.text or detailed else {}
                    yield self._event(index, delta, wants_usage, said)
            if wants_usage:
                yield _sse(self._head | {"choices": [], "usage": self.tally.usage.model_dump()})
            self._log()
            yield b"data: [DONE]\n\n"
        except Refusal as refusal:
            yield _sse(refusal.body)
        except Exception:
            logger.exception("%s failed while it was streamed", self.id)
            yield _sse(failures.broken().body)
        finally:
            self.pending.cancel()

    @property
    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.fingerprint,
        }

    def _event(
        self, index: int, delta: dict[str, Any], wants_usage: bool, said: Said | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None}
        if said is not None:
            choice["finish_reason"] = said.finish_reason
            if (logprobs := self._logprobs([said])) is not None:
                choice["logprobs"] = logprobs.model_dump()
            if (explained := self._explained([said])) is not None:
                choice["explain"] = [token.model_dump() for token in explained]
        return _sse(self._head | {"choices": [choice]} | ({"usage": None} if wants_usage else {}))

    def _logprobs(self, steps: list[Said]) -> Logprobs | None:
        if not self.body.logprobs:
            return None
        content = [
            TokenLogprob(
                **_token(said.token, said.logprob or 0.0),
                top_logprobs=[
                    TopLogprob(**_token(other.text, other.logprob)) for other in said.alternatives
                ],
            )
            for said in steps
            if said.counted
        ]
        return Logprobs(content=content)

    def _explained(self, steps: list[Said]) -> list[ExplainedToken] | None:
        if not self.body.explain:
            return None
        return [
            ExplainedToken(
                token=said.token,
                base=_finite(said.base or 0.0),
                reward=None if said.reward is None else _finite(said.reward),
                combined=_finite(said.logprob or 0.0),
                changed=said.changed,
            )
            for said in steps
            if said.counted
        ]

    def _log(self) -> None:
        logger.info(
            "%s: %d prompt tokens, %d tokens, %d changed, %.0f ms base, %.0f ms reward",
            self.id, self.tally.num_prompt_tokens, self.tally.num_tokens,
            self.tally.num_changed, self.tally.base_s * 1000, self.tally.reward_s * 1000,
        )  # fmt: skip


def router(serving: Serving) -> APIRouter:
    """The route."""
    routes = APIRouter(prefix="/v1", responses=failures.IN_OPENAPI)

    @routes.post("/chat/completions", response_model=ChatResponse)
    async def chat(body: ChatRequest, request: Request) -> Any:
        if serving.options.log_prompts:
            logger.info("asked: %s", _words(body))
        check(body, serving=serving)
        asking = serving.ask(lambda: asked_from(body, serving=serving), num_choices=body.n or 1)
        try:
            pending = await unless_hung_up(request, asking)
            name = request_id(request)
            answer = _Chat(body, pending, name=name, fingerprint=serving.fingerprint)
            if body.stream:
                return Stream(answer.events(), media_type="text/event-stream")
            try:
                whole = await unless_hung_up(request, answer.whole())
            finally:
                pending.cancel()
        except HungUp:
            return Response(status_code=499)
        # OpenAI's clients look for `logprobs` even where it is null; for `explain` nobody does.
        leave_out = None if body.explain else {"choices": {"__all__": {"explain"}}}
        return Response(whole.model_dump_json(exclude=leave_out), media_type="application/json")

    return routes


def _words(body: ChatRequest) -> str:
    return " | ".join(
        " ".join(part.text if part.type == "text" else "<image>" for part in message.parts)
        for message in body.messages
    )


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8"))}


def _finite(logprob: float) -> float:
    """JSON has no -Infinity; OpenAI says -9999 for what cannot be."""
    return max(logprob, -9999.0)


def _sse(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
