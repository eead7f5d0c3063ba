"""OpenAI's API: `/v1/chat/completions`, with streaming, and `/v1/models`."""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import PIL.Image
from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest

from tita.align import Guidance, Request, Sampling, TokenOutput, Turn
from tita.serve import errors
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.errors import APIError, replace_surrogates, request_id
from tita.serve.images import EncodedImage, image_from_url
from tita.serve.model_cards import DIGEST_HEADER, model_card, model_cards
from tita.serve.scheduler import OutputQueue
from tita.serve.schemas import (
    ChatChoice,
    ChatRequest,
    ChatResponse,
    ExplainedToken,
    Logprobs,
    ModelCard,
    ModelList,
    ResponseMessage,
    TextPart,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from tita.serve.spelling import SpelledToken, Speller
from tita.serve.streaming import ClientDisconnected, StreamResponse, cancel_on_disconnect

logger = logging.getLogger(__name__)


def create_router(engine: AsyncEngine) -> APIRouter:
    """The routes of OpenAI's API."""
    routes = APIRouter(prefix="/v1", responses=errors.OPENAPI_RESPONSES)

    @routes.post("/chat/completions", response_model=ChatResponse)
    async def chat_completions(body: ChatRequest, http_request: HTTPRequest) -> Any:
        if engine.options.log_prompts:
            messages = [
                " ".join(each.text if each.type == "text" else "<image>" for each in message.parts)
                for message in body.messages
            ]
            logger.info("prompt: %s", " | ".join(messages))
        guidance = _check(body, engine)
        card = model_card(engine, body.model)
        submission = engine.submit(lambda: _parse(body, guidance, engine), num_choices=body.n or 1)
        try:
            queue = await cancel_on_disconnect(http_request.receive, submission)
            completion = _ChatCompletion(body, queue, id=request_id(http_request), card=card)
            if body.stream:
                stream = StreamResponse(completion.events(), media_type="text/event-stream")
                stream.headers[DIGEST_HEADER] = card.digest
                return stream
            try:
                response = await cancel_on_disconnect(http_request.receive, completion.response())
            finally:
                queue.cancel()
        except ClientDisconnected:
            return Response(status_code=499)
        # OpenAI's clients expect `logprobs` also if it is null, but know no `explain`.
        exclude = None if body.explain else {"choices": {"__all__": {"explain"}}}
        return Response(
            response.model_dump_json(exclude=exclude),
            media_type="application/json",
            headers={DIGEST_HEADER: card.digest},
        )

    @routes.get("/models", response_model=ModelList)
    async def models() -> ModelList:
        return ModelList(data=model_cards(engine))

    @routes.get("/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> ModelCard:
        return model_card(engine, name)

    return routes


def _check(body: ChatRequest, engine: AsyncEngine) -> Guidance:
    """Check everything that needs no image; the guidance of the request.

    Raises:
        APIError: the request is invalid or not supported.
    """
    if name := body.unsupported_field:
        raise APIError(f"{name} is not supported", param=name, code="unsupported")
    guidance = engine.resolve_guidance(
        body.model,
        weight=body.guidance_weight,
        form=body.guidance_form,
        plausibility=body.guidance_plausibility,
    )
    options, limits = engine.options, engine.options.limits
    if (body.max_new_tokens or 0) > limits.max_output_tokens:
        raise APIError(
            f"{body.max_new_tokens} output tokens are more than {limits.max_output_tokens}",
            param="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
        )
    max_choices = min(limits.max_choices, options.max_batch + options.max_waiting)
    if (body.n or 1) > max_choices:
        raise APIError(f"n must be at most {max_choices}", param="n")
    if body.stream_options and not body.stream:
        raise APIError("stream_options requires stream", param="stream_options")
    if body.top_logprobs and not body.logprobs:
        raise APIError("top_logprobs requires logprobs", param="top_logprobs")
    parts = [part for message in body.messages for part in message.parts]
    limits.check_prompt(
        num_characters=sum(len(part.text) for part in parts if isinstance(part, TextPart)),
        num_images=sum(not isinstance(part, TextPart) for part in parts),
    )
    return guidance


def _parse(body: ChatRequest, guidance: Guidance, engine: AsyncEngine) -> ParsedRequest:
    """Convert the body into the engine's request. Blocks while images are fetched.

    Raises:
        APIError: an image is in the wrong place or cannot be fetched.
    """
    messages = [_parse_parts(body, number, engine) for number in range(len(body.messages))]
    parts = [part for message in messages for part in message]
    sampling: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "repetition_penalty": body.repetition_penalty,
    }

    def build(images: Sequence[PIL.Image.Image]) -> Request:
        remaining = iter(images)
        return Request(
            turns=tuple(
                Turn(
                    role="system" if message.role == "developer" else message.role,
                    parts=tuple(
                        part if isinstance(part, str) else next(remaining) for part in content
                    ),
                )
                for message, content in zip(body.messages, messages, strict=True)
            ),
            guidance=guidance,
            sampling=Sampling(
                max_new_tokens=body.max_new_tokens or engine.options.limits.default_output_tokens,
                seed=secrets.randbits(62) if body.seed is None else body.seed,
                ignore_end=bool(body.ignore_eos),
                stops=tuple(replace_surrogates(stop) for stop in body.stops),
                **{name: value for name, value in sampling.items() if value is not None},
            ),
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
            explain=bool(body.explain),
        )

    return ParsedRequest(
        num_characters=sum(len(part) for part in parts if isinstance(part, str)),
        images=tuple(part for part in parts if not isinstance(part, str)),
        build=build,
    )


def _parse_parts(body: ChatRequest, number: int, engine: AsyncEngine) -> list[str | EncodedImage]:
    message = body.messages[number]
    parts: list[str | EncodedImage] = []
    for index, part in enumerate(message.parts):
        if isinstance(part, TextPart):
            parts.append(replace_surrogates(part.text))
            continue
        param = f"messages.{number}.content.{index}.image_url"
        if message.role != "user":
            raise APIError("only user messages may have images", param=param)
        url, limits = part.image_url.url, engine.options.limits
        parts.append(image_from_url(url, limits=limits, fetcher=engine.fetcher, param=param))
    return parts


class _ChatCompletion:
    """One chat completion: reads the outputs of the scheduler and writes the response."""

    def __init__(self, body: ChatRequest, queue: OutputQueue, *, id: str, card: ModelCard) -> None:
        self.id = f"chatcmpl-{id}"
        self.created = int(time.time())
        self.body = body
        self.queue = queue
        self.fingerprint = card.system_fingerprint
        self.num_prompt_tokens = queue.requests[0].prepared.num_prompt_tokens
        self.num_tokens = 0
        self.num_changed = 0
        self.base_s = 0.0
        self.reward_s = 0.0

    async def response(self) -> ChatResponse:
        """The complete response."""
        outputs: list[list[TokenOutput]] = [[] for _ in self.queue.requests]
        async for index, output in self.queue.outputs():
            self._count(output)
            outputs[index].append(output)
        self._log()
        choices = [
            ChatChoice(
                index=index,
                message=ResponseMessage(content="".join(each.text for each in tokens).rstrip()),
                finish_reason=tokens[-1].finish_reason or "stop",
                logprobs=self._logprobs(_spell(tokens)),
                explain=self._explained(tokens),
            )
            for index, tokens in enumerate(outputs)
        ]
        return ChatResponse(
            id=self.id,
            created=self.created,
            model=self.body.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=self.usage,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. The status has been sent, so an error is an event too."""
        include_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        no_usage = {"usage": None} if include_usage else {}
        outputs = self.queue.outputs()
        spellers = [Speller() for _ in self.queue.requests]
        try:
            for index in range(len(self.queue.requests)):
                choice = {"index": index, "delta": {"role": "assistant", "content": ""}}
                yield self._chunk([choice | {"finish_reason": None}], **no_usage)
            async for index, output in outputs:
                self._count(output)
                spelled = spellers[index].add(output)
                detailed = bool(self.body.logprobs and spelled) or (
                    self.body.explain and output.counted
                )
                if output.text or output.finish_reason or detailed:
                    delta = {"content": output.text} if output.text or detailed else {}
                    choice = {"index": index, "delta": delta}
                    choice["finish_reason"] = output.finish_reason
                    if (logprobs := self._logprobs(spelled)) is not None:
                        choice["logprobs"] = logprobs.model_dump()
                    if (explained := self._explained([output])) is not None:
                        choice["explain"] = [token.model_dump() for token in explained]
                    yield self._chunk([choice], **no_usage)
            if include_usage:
                yield self._chunk([], usage=self.usage.model_dump())
            self._log()
            yield b"data: [DONE]\n\n"
        except APIError as error:
            yield _sse(error.body)
        except Exception:
            logger.exception("%s failed while streaming", self.id)
            yield _sse(errors.internal_error().body)
        finally:
            self.queue.cancel()

    def _count(self, output: TokenOutput) -> None:
        self.num_tokens += output.counted
        self.num_changed += output.changed
        self.base_s += output.base_s
        self.reward_s += output.reward_s

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

    def _chunk(self, choices: list[dict[str, Any]], **usage: Any) -> bytes:
        head = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.fingerprint,
        }
        return _sse(head | {"choices": choices} | usage)

    def _logprobs(self, spelled: list[SpelledToken]) -> Logprobs | None:
        if not self.body.logprobs:
            return None
        content = [
            TokenLogprob(
                token=each.output.token,
                logprob=_finite(each.output.logprob or 0.0),
                bytes=list(each.bytes),
                top_logprobs=[
                    TopLogprob(
                        token=other.text, logprob=_finite(other.logprob), bytes=list(other.bytes)
                    )
                    for other in each.output.alternatives
                ],
            )
            for each in spelled
        ]
        return Logprobs(content=content)

    def _explained(self, outputs: list[TokenOutput]) -> list[ExplainedToken] | None:
        if not self.body.explain:
            return None
        return [
            ExplainedToken(
                token=output.token,
                base=_finite(output.base or 0.0),
                reward=None if output.reward is None else _finite(output.reward),
                combined=_finite(output.logprob or 0.0),
                changed=output.changed,
            )
            for output in outputs
            if output.counted
        ]

    def _log(self) -> None:
        logger.info(
            "%s: %d prompt tokens, %d tokens, %d changed, %.0f ms base, %.0f ms reward",
            self.id, self.num_prompt_tokens, self.num_tokens,
            self.num_changed, self.base_s * 1000, self.reward_s * 1000,
        )  # fmt: skip


def _spell(outputs: list[TokenOutput]) -> list[SpelledToken]:
    speller = Speller()
    return [spelled for output in outputs for spelled in speller.add(output)]


def _finite(logprob: float) -> float:
    """JSON has no -Infinity; OpenAI's API returns -9999 for impossible tokens."""
    return max(logprob, -9999.0)


def _sse(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
