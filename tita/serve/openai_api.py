"""OpenAI's chat API: `/v1/chat/completions`, with streaming, and `/v1/models`."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import PIL.Image
from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest

from tita.align import Guidance, Request, TokenOutput, Turn
from tita.align.best_of import check_best_of, ranking, score
from tita.errors import TitaError
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.errors import OPENAPI_RESPONSES, APIError, replace_surrogates, request_id
from tita.serve.generation import (
    CompletionWriter,
    check_generation,
    check_length,
    finite,
    sampling_of,
)
from tita.serve.images import EncodedImage, image_from_url
from tita.serve.json_route import JSONRoute
from tita.serve.model_cards import DIGEST_HEADER, model_card, model_cards
from tita.serve.request_fields import check_unknown_fields, ignored_header
from tita.serve.schemas import (
    ChatChoice,
    ChatRequest,
    ChatResponse,
    ExplainedToken,
    Logprobs,
    Message,
    ModelCard,
    ModelList,
    ResponseMessage,
    TextPart,
    TokenLogprob,
    TopLogprob,
)
from tita.serve.spelling import SpelledToken, Speller
from tita.serve.streaming import ClientDisconnected, StreamResponse, cancel_on_disconnect

logger = logging.getLogger(__name__)

EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response, or with `stream` its chunks as server-sent events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
"""For the OpenAPI document: a route's second content type."""


def create_router(engine: AsyncEngine) -> APIRouter:
    """The routes of OpenAI's chat API."""
    routes = APIRouter(prefix="/v1", responses=OPENAPI_RESPONSES, route_class=JSONRoute)

    @routes.post("/chat/completions", response_model=ChatResponse, responses=EVENT_STREAM)
    async def chat_completions(body: ChatRequest, http_request: HTTPRequest) -> Any:
        ignored = check_unknown_fields(body)
        guidance = _check(body, engine)
        if engine.options.log_prompts:
            messages = [
                " ".join(each.text if each.type == "text" else "<image>" for each in message.parts)
                for message in body.messages
            ]
            logger.info("prompt: %s", " | ".join(messages))
        card = model_card(engine, body.model)
        headers = {DIGEST_HEADER: card.digest} | ignored_header(ignored)
        parse = partial(_parse, body, guidance, engine)
        has_images = any(part.type != "text" for each in body.messages for part in each.parts)
        submission = engine.submit(parse if has_images else parse(), num_choices=body.num_samples)
        try:
            queue = await cancel_on_disconnect(http_request.receive, submission)
            writer = _ChatWriter(body, [queue], id=request_id(http_request), card=card)
            if body.stream:
                stream = StreamResponse(writer.events(), media_type="text/event-stream")
                stream.headers.update(headers)
                return stream
            try:
                response = await cancel_on_disconnect(http_request.receive, writer.response())
            finally:
                queue.cancel()
        except ClientDisconnected:
            return Response(status_code=499)
        # OpenAI's clients expect `logprobs` also if it is null, but know no `explain`.
        absent = {"explain"} if not body.explain else set()
        absent |= {"score"} if not body.best_of else set()
        exclude = {"choices": {"__all__": absent}}
        return Response(
            response.model_dump_json(exclude=exclude),
            media_type="application/json",
            headers=headers,
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
    guidance = check_generation(body, engine)
    max_new_tokens = body.max_new_tokens or engine.options.limits.default_output_tokens
    param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    check_length(body, engine, max_new_tokens=max_new_tokens, param=param)
    if body.top_logprobs and not body.logprobs:
        raise APIError("top_logprobs requires logprobs", param="top_logprobs")
    check_messages(body.messages, engine)
    if body.best_of is not None:
        _check_best_of(body, engine, number=body.best_of)
    return guidance


def _check_best_of(body: ChatRequest, engine: AsyncEngine, *, number: int) -> None:
    """Check that several responses can be sampled and compared.

    Raises:
        APIError: they cannot.
    """
    most = min(engine.options.limits.max_choices, engine.options.num_places)
    if not (body.n or 1) <= number <= most:
        raise APIError(f"best_of must be at least n and at most {most}", param="best_of")
    if body.stream:
        raise APIError("best_of cannot be streamed: all responses come first", param="best_of")
    try:
        check_best_of(number, temperature=body.temperature or 0.0, rewards=engine.rewards)
    except TitaError as error:
        raise APIError(str(error), param="best_of") from None


def check_messages(messages: Sequence[Message], engine: AsyncEngine) -> None:
    """Check what is known before an image is fetched or a token counted.

    Raises:
        APIError: the messages are empty, too long, or have too many images.
    """
    parts = [part for message in messages for part in message.parts]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    engine.options.limits.check_prompt(
        num_characters=sum(map(len, texts)), num_images=len(parts) - len(texts)
    )
    if len(parts) == len(texts) and not any(text.strip() for text in texts):
        raise APIError(
            "the prompt is empty: the messages have no text and no image",
            param="messages",
            code="empty_prompt",
        )


def _parse(body: ChatRequest, guidance: Guidance, engine: AsyncEngine) -> ParsedRequest:
    max_new_tokens = body.max_new_tokens or engine.options.limits.default_output_tokens
    return parse_messages(
        body.messages,
        engine,
        guidance=guidance,
        sampling=sampling_of(body, max_new_tokens=max_new_tokens),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        explain=bool(body.explain),
        score=bool(body.best_of) and bool(engine.rewards),
    )


def parse_messages(
    messages: Sequence[Message], engine: AsyncEngine, **fields: Any
) -> ParsedRequest:
    """Convert messages into the engine's request. Blocks while images are fetched.

    Args:
        fields: further fields of the engine's request.

    Raises:
        APIError: an image is in the wrong place or cannot be fetched.
    """
    contents = [_parse_parts(message, number, engine) for number, message in enumerate(messages)]
    roles = [message.role for message in messages]
    parts = [part for content in contents for part in content]

    def build(images: Sequence[PIL.Image.Image]) -> Request:
        remaining = iter(images)
        turns = tuple(
            Turn(
                role="system" if role == "developer" else role,
                parts=tuple(part if isinstance(part, str) else next(remaining) for part in content),
            )
            for role, content in zip(roles, contents, strict=True)
        )
        return Request(turns=turns, **fields)

    return ParsedRequest(
        num_characters=sum(len(part) for part in parts if isinstance(part, str)),
        images=tuple(part for part in parts if not isinstance(part, str)),
        build=build,
    )


def _parse_parts(message: Message, number: int, engine: AsyncEngine) -> list[str | EncodedImage]:
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


class _ChatWriter(CompletionWriter):
    """Writes the response of one chat completion."""

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, *arguments: Any, **options: Any) -> None:
        super().__init__(body, *arguments, **options)
        self._has_logprobs = bool(body.logprobs)
        self._has_explain = bool(body.explain)
        self._best = (body.n or 1) if body.best_of else 0
        """Number of responses to return of those that were sampled; 0 for all, in order."""
        self._spellers = [Speller() for _ in self.queue.requests]

    async def response(self) -> ChatResponse:
        """The complete response."""
        outputs = await self.collect()
        scores = [score(tokens) for tokens in outputs]
        kept = ranking(scores)[: self._best] if self._best else range(len(outputs))
        choices = [
            ChatChoice(
                index=place,
                score=scores[index],
                message=ResponseMessage(content="".join(each.text for each in tokens).rstrip()),
                finish_reason=tokens[-1].finish_reason or "stop",
                logprobs=self._logprobs(
                    [spelled for each in tokens for spelled in self._spellers[index].add(each)]
                ),
                explain=self._explained(tokens),
            )
            for place, index in enumerate(kept)
            for tokens in [outputs[index]]
        ]
        return ChatResponse(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=self.usage,
        )

    def stream_choice(self, index: int, output: TokenOutput, *, first: bool) -> dict[str, Any]:
        spelled = self._spellers[index].add(output) if self._has_logprobs else []
        detailed = spelled or (self._has_explain and output.counted)
        if not (first or output.text or output.finish_reason or detailed):
            return {}
        # The role comes with the first token: clients take the first chunk for the first token.
        delta = {"role": "assistant"} if first else {}
        if first or output.text or detailed:
            delta["content"] = output.text
        choice = {"index": index, "delta": delta, "finish_reason": output.finish_reason}
        if (logprobs := self._logprobs(spelled)) is not None:
            choice["logprobs"] = logprobs.model_dump()
        if (explained := self._explained([output])) is not None:
            choice["explain"] = [token.model_dump() for token in explained]
        return choice

    def _logprobs(self, spelled: list[SpelledToken]) -> Logprobs | None:
        if not self._has_logprobs:
            return None
        content = [
            TokenLogprob(
                token=each.output.token,
                logprob=finite(each.output.logprob or 0.0),
                bytes=list(each.bytes),
                top_logprobs=[
                    TopLogprob(
                        token=other.text, logprob=finite(other.logprob), bytes=list(other.bytes)
                    )
                    for other in each.output.alternatives
                ],
            )
            for each in spelled
        ]
        return Logprobs(content=content)

    def _explained(self, outputs: list[TokenOutput]) -> list[ExplainedToken] | None:
        if not self._has_explain:
            return None
        return [
            ExplainedToken(
                token=output.token,
                base=finite(output.base or 0.0),
                reward=None if output.reward is None else finite(output.reward),
                terms={name: finite(logprob) for name, logprob in output.terms},
                combined=finite(output.logprob or 0.0),
                changed=output.changed,
            )
            for output in outputs
            if output.counted
        ]
