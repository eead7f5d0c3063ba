"""`/v1/chat/completions`: OpenAI's chat completions, whole and as a stream."""

import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest

from tita.align import Guidance, Request, Sampling, TokenOutput, Turn
from tita.serve import errors
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.errors import APIError, encodable, request_id, too_long
from tita.serve.images import EncodedImage, image_from_url
from tita.serve.options import Limits
from tita.serve.scheduler import OutputQueue
from tita.serve.schemas import (
    Answered,
    ChatRequest,
    ChatResponse,
    Choice,
    ExplainedToken,
    Logprobs,
    Message,
    ModelCard,
    ModelList,
    TextPart,
    TokenLogprob,
    TopLogprob,
    Usage,
    unsupported,
)
from tita.serve.streaming import ClientDisconnected, Stream, cancel_on_disconnect

if TYPE_CHECKING:
    from PIL.Image import Image


logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What a request has cost so far."""

    num_prompt_tokens: int
    num_tokens: int = 0
    num_changed: int = 0
    base_s: float = 0.0
    reward_s: float = 0.0

    def add(self, said: TokenOutput) -> None:
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
    steps: list[TokenOutput] = field(default_factory=list)


class _Chat:
    """One chat completion on its way out."""

    def __init__(
        self, body: ChatRequest, pending: OutputQueue, *, name: str, fingerprint: str
    ) -> None:
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
        except APIError as refusal:
            yield _sse(refusal.body)
        except Exception:
            logger.exception("%s failed while it was streamed", self.id)
            yield _sse(errors.broken().body)
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
        self, index: int, delta: dict[str, Any], wants_usage: bool, said: TokenOutput | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None}
        if said is not None:
            choice["finish_reason"] = said.finish_reason
            if (logprobs := self._logprobs([said])) is not None:
                choice["logprobs"] = logprobs.model_dump()
            if (explained := self._explained([said])) is not None:
                choice["explain"] = [token.model_dump() for token in explained]
        return _sse(self._head | {"choices": [choice]} | ({"usage": None} if wants_usage else {}))

    def _logprobs(self, steps: list[TokenOutput]) -> Logprobs | None:
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

    def _explained(self, steps: list[TokenOutput]) -> list[ExplainedToken] | None:
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


def router(serving: AsyncEngine) -> APIRouter:
    """The route."""
    routes = APIRouter(prefix="/v1", responses=errors.IN_OPENAPI)

    @routes.post("/chat/completions", response_model=ChatResponse)
    async def chat(body: ChatRequest, request: HTTPRequest) -> Any:
        if serving.options.log_prompts:
            logger.info("asked: %s", _words(body))
        check(body, serving=serving)
        asking = serving.ask(lambda: asked_from(body, serving=serving), num_choices=body.n or 1)
        try:
            pending = await cancel_on_disconnect(request, asking)
            name = request_id(request)
            answer = _Chat(body, pending, name=name, fingerprint=serving.fingerprint)
            if body.stream:
                return Stream(answer.events(), media_type="text/event-stream")
            try:
                whole = await cancel_on_disconnect(request, answer.whole())
            finally:
                pending.cancel()
        except ClientDisconnected:
            return Response(status_code=499)
        # OpenAI's clients look for `logprobs` even where it is null; for `explain` nobody does.
        leave_out = None if body.explain else {"choices": {"__all__": {"explain"}}}
        return Response(whole.model_dump_json(exclude=leave_out), media_type="application/json")

    @routes.get("/models", response_model=ModelList)
    async def models() -> ModelList:
        return ModelList(data=_cards(serving))

    @routes.get("/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> ModelCard:
        cards = _cards(serving)
        guidance_weight(name, None, serving=serving)
        return next(card for card in cards if card.id == name)

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


def _cards(serving: AsyncEngine) -> list[ModelCard]:
    """The aligned model, then the base alone.

    Raises:
        APIError: they are still being loaded.
    """
    base = serving.base
    if base is None:
        raise errors.loading()

    def card(name: str, *, guided: bool) -> ModelCard:
        return ModelCard(
            id=name,
            created=serving.created,
            root=base.name,
            parent=None if name == serving.options.base_name else serving.options.base_name,
            max_model_len=serving.context,
            guidance_weight=serving.options.weight if guided else 0.0,
            guidance_form=serving.options.form,
            guidance_forms=serving.forms,
            guidance_plausibility=serving.options.plausibility if guided else 0.0,
            base=base,
            reward=serving.reward if guided else None,
            reference=serving.reference if guided else None,
        )

    options = serving.options
    return [card(options.name, guided=serving.guided), card(options.base_name, guided=False)]


def check(body: ChatRequest, *, serving: AsyncEngine) -> None:
    """Look at all that can be seen without opening an image.

    Raises:
        APIError: something in it cannot be done.
    """
    if name := unsupported(body.model_extra or {}):
        raise APIError(f"{name} is not supported", param=name, code="unsupported")
    request_guidance(body, serving=serving)
    limits = serving.options.limits
    _check_counts(body, serving=serving)
    parts = [part for message in body.messages for part in message.parts]
    check_length(sum(len(part.text) for part in parts if isinstance(part, TextPart)), limits=limits)
    num_images = sum(not isinstance(part, TextPart) for part in parts)
    if num_images > limits.max_images:
        raise APIError(
            f"{num_images} images are more than {limits.max_images}",
            param="messages", code="too_many_images",
        )  # fmt: skip


def check_length(num_characters: int, *, limits: Limits) -> None:
    """Look at a prompt's length before anything is done with it.

    Raises:
        APIError: its tokens are too many, however they are counted.
    """
    if num_characters > limits.max_prompt_characters:
        most = limits.max_prompt_characters
        raise too_long(f"the prompt has {num_characters:,} characters, more than {most:,}")


def asked_from(body: ChatRequest, *, serving: AsyncEngine) -> ParsedRequest:
    """What the client asks the engine for. Blocks while it fetches images.

    Raises:
        APIError: an image cannot be had.
    """
    messages = [_parts(message, n, serving) for n, message in enumerate(body.messages)]
    parts = [part for message in messages for part in message]

    def request(images: "Sequence[Image]") -> Request:
        left = iter(images)
        return Request(
            turns=tuple(
                Turn(
                    role="system" if message.role == "developer" else message.role,
                    parts=tuple(part if isinstance(part, str) else next(left) for part in content),
                )
                for message, content in zip(body.messages, messages, strict=True)
            ),
            guidance=request_guidance(body, serving=serving),
            sampling=_sampling(body, serving=serving),
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
            explain=bool(body.explain),
        )

    return ParsedRequest(
        num_characters=sum(len(part) for part in parts if isinstance(part, str)),
        images=tuple(part for part in parts if not isinstance(part, str)),
        request=request,
    )


class GuidanceFields(Protocol):
    """The fields of a request body that guide it."""

    @property
    def model(self) -> str: ...
    @property
    def guidance_weight(self) -> float | None: ...
    @property
    def guidance_form(self) -> str | None: ...
    @property
    def guidance_plausibility(self) -> float | None: ...


def guidance_weight(model: str, wanted: float | None, *, serving: AsyncEngine) -> float:
    """The weight that a request for `model` is guided by.

    Raises:
        APIError: no such model, or a weight that it cannot be guided by.
    """
    options = serving.options
    if model == options.base_name:
        if wanted:
            raise APIError(f"{model} is not guided; ask {options.name}", param="guidance_weight")
        return 0.0
    if model != options.name:
        raise APIError(
            f"no model {model!r}; there are {options.name} and {options.base_name}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
    if wanted is None:
        return options.weight if serving.guided else 0.0
    if wanted and not serving.guided:
        raise APIError("the server has no reward model to guide with", param="guidance_weight")
    return wanted


def request_guidance(body: GuidanceFields, *, serving: AsyncEngine) -> Guidance:
    """How a request is guided.

    Raises:
        APIError: no such model or form, or this server's models do not support it.
    """
    weight = guidance_weight(body.model, body.guidance_weight, serving=serving)
    form = body.guidance_form or serving.options.form
    if form not in serving.forms:
        known = ", ".join(serving.forms)
        raise APIError(f"no guidance form {form!r} here; there are {known}", param="guidance_form")
    bound = body.guidance_plausibility
    return Guidance(
        weight=weight,
        form=form,
        plausibility=serving.options.plausibility if bound is None else bound,
    )


def _check_counts(body: ChatRequest, *, serving: AsyncEngine) -> None:
    limits = serving.options.limits
    if (body.wanted_tokens or 0) > limits.max_output_tokens:
        raise APIError(
            f"{body.wanted_tokens} output tokens are more than {limits.max_output_tokens}",
            param="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
        )
    most = min(limits.max_choices, serving.options.max_batch + serving.options.max_waiting)
    if (body.n or 1) > most:
        raise APIError(f"n is at most {most}", param="n")
    if body.stream_options and not body.stream:
        raise APIError("stream_options needs stream", param="stream_options")
    if body.top_logprobs and not body.logprobs:
        raise APIError("top_logprobs needs logprobs", param="top_logprobs")


def _sampling(body: ChatRequest, *, serving: AsyncEngine) -> Sampling:
    import secrets

    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "repetition_penalty": body.repetition_penalty,
    }
    return Sampling(
        max_new_tokens=body.wanted_tokens or serving.options.limits.default_output_tokens,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        ignore_end=bool(body.ignore_eos),
        stops=tuple(encodable(stop) for stop in body.stops),
        **{name: value for name, value in given.items() if value is not None},
    )


def _parts(message: Message, number: int, serving: AsyncEngine) -> list[str | EncodedImage]:
    parts: list[str | EncodedImage] = []
    for place, part in enumerate(message.parts):
        if isinstance(part, TextPart):
            parts.append(encodable(part.text))
            continue
        param = f"messages.{number}.content.{place}.image_url"
        if message.role != "user":
            raise APIError("only a user's message has images", param=param)
        parts.append(
            image_from_url(
                part.image_url.url,
                limits=serving.options.limits,
                fetcher=serving.fetcher,
                param=param,
            )
        )
    return parts
