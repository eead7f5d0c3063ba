"""Tokens of a text or a conversation, and the text of tokens: vLLM's `/tokenize` and `/detokenize`.

Spec: docs.vllm.ai, OpenAI-compatible server, Tokenizer API. The tokens are those that the base
model gets for the same prompt, image tokens included.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from tita.align import Request
from tita.align.forms import UNGUIDED
from tita.align.prompts import Preparer
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.completions_api import TokenId
from tita.serve.errors import OPENAPI_RESPONSES, replace_surrogates
from tita.serve.json_route import JSONRoute
from tita.serve.model_cards import model_card
from tita.serve.openai_api import check_messages, parse_messages
from tita.serve.request_fields import RequestModel, check_unknown_fields, ignored_header
from tita.serve.schemas import Message


class TokenizeRequest(RequestModel):
    """Body of `POST /tokenize`: a `prompt` or `messages`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = None
    """Optional: all models of a server have one tokenizer."""
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    add_special_tokens: StrictBool = True
    """Whether a prompt gets a beginning-of-text token, as in `/v1/completions`."""
    return_token_strs: StrictBool | None = False

    @model_validator(mode="after")
    def _check_form(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_form", "send either prompt or messages")
        return self


class TokenizeResponse(BaseModel):
    """Response to `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = None
    """Optional: all models of a server have one tokenizer."""
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]


class DetokenizeResponse(BaseModel):
    """Response to `POST /detokenize`."""

    prompt: str


def create_router(engine: AsyncEngine) -> APIRouter:
    """The routes of vLLM's tokenizer API."""
    routes = APIRouter(responses=OPENAPI_RESPONSES, route_class=JSONRoute)

    @routes.post("/tokenize", response_model=TokenizeResponse)
    async def tokenize(body: TokenizeRequest, response: Response) -> TokenizeResponse:
        response.headers.update(ignored_header(check_unknown_fields(body)))
        card = model_card(engine, body.model or engine.options.name)
        parse, special = _parse(body, engine), body.add_special_tokens

        def work(preparer: Preparer, parsed: ParsedRequest) -> tuple[list[int], list[str]]:
            request = parsed.build([image.decode() for image in parsed.images])
            tokens = preparer.token_ids(request, add_special_tokens=special)
            return tokens, preparer.token_strings(tokens) if body.return_token_strs else []

        tokens, strings = await engine.call_preparer(parse, work)
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=card.max_model_len,
            tokens=tokens,
            token_strs=strings if body.return_token_strs else None,
        )

    @routes.post("/detokenize", response_model=DetokenizeResponse)
    async def detokenize(body: DetokenizeRequest, response: Response) -> DetokenizeResponse:
        response.headers.update(ignored_header(check_unknown_fields(body)))
        model_card(engine, body.model or engine.options.name)
        text = await engine.call_preparer(
            _text_only("", num_characters=len(body.tokens), param="tokens"),
            lambda preparer, _: preparer.text(body.tokens),
        )
        return DetokenizeResponse(prompt=text)

    return routes


def _parse(body: TokenizeRequest, engine: AsyncEngine) -> Callable[[], ParsedRequest]:
    if body.messages is not None:
        messages = body.messages
        check_messages(messages, engine)
        return lambda: parse_messages(messages, engine, guidance=UNGUIDED)
    text = replace_surrogates(body.prompt or "")
    engine.options.limits.check_prompt(num_characters=len(text), num_images=0, param="prompt")
    return lambda: _text_only(text, num_characters=len(text), param="prompt")


def _text_only(text: str, *, num_characters: int, param: str) -> ParsedRequest:
    return ParsedRequest(
        num_characters=num_characters,
        images=(),
        build=lambda _: Request(raw=text, guidance=UNGUIDED),
        param=param,
    )
