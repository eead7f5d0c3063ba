"""LLaVA's controller and worker protocol, for its scripts and front ends.

Spec: `llava/serve/{controller,model_worker,test_message}.py` of github.com/haotian-liu/LLaVA.
A stream consists of JSON objects, each followed by a zero byte; errors are objects with an
`error_code`. As in LLaVA, the HTTP status of a stream is 200 even if it fails; only errors detected
before it starts have another status.
"""

import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

import PIL.Image
from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tita.align import Guidance, Request, Sampling
from tita.serve import errors
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.completions_api import check_not_blank
from tita.serve.errors import (
    LLAVA_STREAM_PATH,
    OPENAPI_RESPONSES,
    APIError,
    llava_chunk,
    replace_surrogates,
)
from tita.serve.images import image_from_base64
from tita.serve.json_route import JSONRoute
from tita.serve.model_cards import DIGEST_HEADER, model_card
from tita.serve.request_fields import (
    INTEGRAL,
    GuidanceFields,
    NumTokens,
    RepetitionPenalty,
    Temperature,
    TopP,
    check_unknown_fields,
    ignored_header,
)
from tita.serve.scheduler import OutputQueue
from tita.serve.streaming import StreamResponse

logger = logging.getLogger(__name__)


def _as_number(given: Any) -> Any:
    """LLaVA's worker casts its parameters, so its clients may send numbers as text."""
    if not isinstance(given, str):
        return given
    try:
        return float(given)
    except ValueError:
        return given


_NUMBER = BeforeValidator(_as_number, json_schema_input_type=float | str)


class GenerateRequest(GuidanceFields):
    """Body of `POST /worker_generate_stream`; the defaults are those of LLaVA's worker."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    prompt: str
    images: Annotated[list[str], Field(max_length=64)] | None = None
    temperature: Annotated[Temperature, _NUMBER] = 1.0
    top_p: Annotated[TopP, _NUMBER] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=0, lt=2**31), INTEGRAL, _NUMBER] = 50
    repetition_penalty: Annotated[RepetitionPenalty, _NUMBER] = 1.0
    max_new_tokens: Annotated[NumTokens, _NUMBER] = 256
    stop: str | None = None


_CHUNKS: dict[int | str, dict[str, Any]] = {
    code: {"description": what, "content": {"application/octet-stream": {}}}
    for code, what in {
        200: "JSON objects, each followed by a zero byte",
        **dict.fromkeys(OPENAPI_RESPONSES, "One such object with the error"),
    }.items()
}
"""For the OpenAPI document: responses of the stream, also those that are errors."""


class AddressRequest(BaseModel):
    """Body of `POST /get_worker_address`."""

    model: str


def create_router(engine: AsyncEngine) -> APIRouter:
    """The routes of a controller that has this server as its only worker."""
    routes = APIRouter(responses=OPENAPI_RESPONSES, route_class=JSONRoute)
    names = [engine.options.name, engine.options.base_name]

    @routes.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": names}

    @routes.post("/refresh_all_workers")
    async def refresh() -> None:
        """No effect: the models of this server do not change."""

    @routes.post("/get_worker_address")
    async def address(body: AddressRequest, http_request: HTTPRequest) -> dict[str, str]:
        # As in LLaVA, an unknown model has an empty address.
        own = str(http_request.base_url).rstrip("/")
        return {"address": own if body.model in names else ""}

    @routes.post("/worker_get_status")
    async def status() -> dict[str, Any]:
        return {"model_names": names, "speed": 1, "queue_length": engine.num_requests}

    @routes.post(LLAVA_STREAM_PATH, response_class=Response, responses=_CHUNKS)
    async def generate(body: GenerateRequest) -> Any:
        ignored = check_unknown_fields(body)
        check_not_blank(body.prompt)
        stream = StreamResponse(_chunks(body, engine), media_type="application/octet-stream")
        stream.headers.update(ignored_header(ignored))
        if body.model in names:
            stream.headers[DIGEST_HEADER] = model_card(engine, body.model).digest
        return stream

    return routes


async def _chunks(body: GenerateRequest, engine: AsyncEngine) -> AsyncGenerator[bytes, None]:
    queue: OutputQueue | None = None
    try:
        guidance = engine.resolve_guidance(body.model, body)
        engine.options.limits.check_prompt(
            num_characters=len(body.prompt), num_images=len(body.images or [])
        )
        fingerprint = model_card(engine, body.model).system_fingerprint
        queue = await engine.submit(lambda: _parse(body, guidance, engine))
        # Each chunk has the prompt and all text so far: LLaVA's clients remove the prompt.
        text = body.prompt
        async for _, output in queue.outputs():
            text += output.text
            if output.text or output.finish_reason:
                yield llava_chunk(text, error_code=0, system_fingerprint=fingerprint)
    except APIError as error:
        yield llava_chunk(error.message, error_code=1)
    except Exception:
        logger.exception("%s failed while streaming", LLAVA_STREAM_PATH)
        yield llava_chunk(errors.internal_error().message, error_code=1)
    finally:
        if queue is not None:
            queue.cancel()


def _parse(body: GenerateRequest, guidance: Guidance, engine: AsyncEngine) -> ParsedRequest:
    limits = engine.options.limits
    prompt = replace_surrogates(body.prompt)
    sampling = Sampling(
        # LLaVA's worker silently caps this at 1024; here the cap is the server's limit.
        max_new_tokens=min(body.max_new_tokens, limits.max_output_tokens),
        temperature=body.temperature if body.temperature > 0.001 else 0.0,
        top_p=body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
        seed=secrets.randbits(62),
        stops=(replace_surrogates(body.stop),) if body.stop else (),
    )

    def build(images: Sequence[PIL.Image.Image]) -> Request:
        return Request(raw=prompt, images=tuple(images), guidance=guidance, sampling=sampling)

    return ParsedRequest(
        num_characters=len(prompt),
        images=tuple(image_from_base64(each, limits=limits) for each in body.images or []),
        build=build,
    )
