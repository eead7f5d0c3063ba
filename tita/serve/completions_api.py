"""OpenAI's text completions: `/v1/completions`, for prompts as text or token ids.

Spec: platform.openai.com/docs/api-reference/completions; lists of prompts and token ids as in vLLM.
A prompt is not put into the model's chat template. Images need `/v1/chat/completions`.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import PIL.Image
from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Discriminator, Field, Tag

from tita.align import Guidance, Request, TokenOutput
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.errors import OPENAPI_RESPONSES, APIError, replace_surrogates, request_id
from tita.serve.generation import (
    CompletionWriter,
    check_generation,
    check_length,
    finite,
    sampling_of,
    submit_all,
)
from tita.serve.json_route import JSONRoute
from tita.serve.model_cards import DIGEST_HEADER, model_card
from tita.serve.openai_api import EVENT_STREAM
from tita.serve.request_fields import (
    INTEGRAL,
    GenerationFields,
    check_unknown_fields,
    ignored_header,
)
from tita.serve.schemas import Usage
from tita.serve.spelling import Speller
from tita.serve.streaming import ClientDisconnected, StreamResponse, cancel_on_disconnect

logger = logging.getLogger(__name__)

DEFAULT_OUTPUT_TOKENS = 16
"""As OpenAI and vLLM have it for this API."""

TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31), INTEGRAL]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**20)]


def _prompt_kind(given: Any) -> str:
    if not isinstance(given, list):
        return "text"
    first = given[0] if given else None
    return (
        "texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "ids"
    )


class CompletionRequest(GenerationFields):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[str], Field(min_length=1, max_length=1024), Tag("texts")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=1024), Tag("lists of ids")],
        # So that an error in a list is reported, rather than "not a string".
        Discriminator(_prompt_kind),
    ]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20), INTEGRAL] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]


class CompletionLogprobs(BaseModel):
    """Per-token log-probabilities under the combined distribution, in nats."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Position of each token in the text."""


class CompletionChoice(BaseModel):
    """One generated text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None = None


class CompletionResponse(BaseModel):
    """Response to `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    """`fp_` and the first 12 digits of the model's `digest`."""
    choices: list[CompletionChoice]
    """Those of the first prompt, then those of the next."""
    usage: Usage


def create_router(engine: AsyncEngine) -> APIRouter:
    """The route of OpenAI's text completions."""
    routes = APIRouter(prefix="/v1", responses=OPENAPI_RESPONSES, route_class=JSONRoute)

    @routes.post("/completions", response_model=CompletionResponse, responses=EVENT_STREAM)
    async def completions(body: CompletionRequest, http_request: HTTPRequest) -> Any:
        ignored = check_unknown_fields(body)
        guidance = _check(body, engine)
        if engine.options.log_prompts:
            logger.info("prompt: %s", body.prompt)
        card = model_card(engine, body.model)
        headers = {DIGEST_HEADER: card.digest} | ignored_header(ignored)
        submissions = [
            engine.submit(each, num_choices=body.n or 1)
            for each in [_parse(body, prompt, guidance) for prompt in body.prompts]
        ]
        try:
            queues = await cancel_on_disconnect(http_request.receive, submit_all(submissions))
            writer = _TextWriter(body, queues, id=request_id(http_request), card=card)
            if body.stream:
                stream = StreamResponse(writer.events(), media_type="text/event-stream")
                stream.headers.update(headers)
                return stream
            try:
                response = await cancel_on_disconnect(http_request.receive, writer.response())
            finally:
                writer.queue.cancel()
        except ClientDisconnected:
            return Response(status_code=499)
        return Response(response.model_dump_json(), media_type="application/json", headers=headers)

    return routes


def _check(body: CompletionRequest, engine: AsyncEngine) -> Guidance:
    """Check everything but the tokens; the guidance of the request.

    Raises:
        APIError: the request is invalid or not supported.
    """
    guidance = check_generation(body, engine, num_prompts=len(body.prompts))
    max_new_tokens = body.max_new_tokens or DEFAULT_OUTPUT_TOKENS
    param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    check_length(body, engine, max_new_tokens=max_new_tokens, param=param)
    for prompt in body.prompts:
        if isinstance(prompt, str):
            limits = engine.options.limits
            limits.check_prompt(num_characters=len(prompt), num_images=0, param="prompt")
            check_not_blank(prompt)
    return guidance


def check_not_blank(prompt: str) -> None:
    """Check a prompt that no template is added to.

    Raises:
        APIError: it has no text, so most tokenizers give no token.
    """
    if not prompt.strip():
        raise APIError("the prompt is empty; send some text", param="prompt", code="empty_prompt")


def _parse(body: CompletionRequest, prompt: str | list[int], guidance: Guidance) -> ParsedRequest:
    sampling = sampling_of(body, max_new_tokens=body.max_new_tokens or DEFAULT_OUTPUT_TOKENS)
    logprobs = -1 if body.logprobs is None else body.logprobs

    def build(_: Sequence[PIL.Image.Image]) -> Request:
        form: dict[str, Any] = (
            {"raw": replace_surrogates(prompt)}
            if isinstance(prompt, str)
            else {"token_ids": tuple(prompt)}
        )
        return Request(guidance=guidance, sampling=sampling, num_logprobs=logprobs, **form)

    return ParsedRequest(num_characters=len(prompt), images=(), build=build, param="prompt")


class _TextWriter(CompletionWriter):
    """Writes the response of one text completion."""

    id_prefix = "cmpl"
    chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, *arguments: Any, **options: Any) -> None:
        super().__init__(body, *arguments, **options)
        self._has_logprobs = body.logprobs is not None
        self._spellers = [Speller() for _ in self.queue.requests]
        self._spelled = [b"" for _ in self.queue.requests]
        """The text of the tokens of each choice so far."""

    async def response(self) -> CompletionResponse:
        """The complete response."""
        choices = [
            CompletionChoice(
                index=index,
                text="".join(each.text for each in tokens).rstrip(),
                finish_reason=tokens[-1].finish_reason or "stop",
                logprobs=self._logprobs(index, tokens),
            )
            for index, tokens in enumerate(await self.collect())
        ]
        return CompletionResponse(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=self.usage,
        )

    def stream_choice(self, index: int, output: TokenOutput, *, first: bool) -> dict[str, Any]:
        logprobs = self._logprobs(index, [output])
        detailed = logprobs and logprobs.tokens
        if not (first or output.text or output.finish_reason or detailed):
            return {}
        return {
            "index": index,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "logprobs": logprobs and logprobs.model_dump(),
        }

    def _logprobs(self, index: int, outputs: list[TokenOutput]) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        spelled = [each for output in outputs for each in self._spellers[index].add(output)]
        offsets = []
        for each in spelled:
            # A character that is not complete belongs to the token that completes it.
            offsets.append(len(self._spelled[index].decode("utf-8", "ignore")))
            self._spelled[index] += each.bytes
        tokens = [each.output for each in spelled]
        return CompletionLogprobs(
            tokens=[token.token for token in tokens],
            token_logprobs=[finite(token.logprob or 0.0) for token in tokens],
            top_logprobs=[
                {other.text: finite(other.logprob) for other in token.alternatives}
                for token in tokens
            ],
            text_offset=offsets,
        )
