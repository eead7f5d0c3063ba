"""LLaVA's worker and controller protocol, so that its scripts and front ends find a worker here.

Spec: `llava/serve/{controller,model_worker,test_message}.py` of github.com/haotian-liu/LLaVA.
Streams are JSON objects, each ended by a zero byte; errors are objects with an `error_code`. The
HTTP status of a stream is 200 as it is there, but for what is refused before it begins.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tita.align import Request as EngineRequest
from tita.align import Sampling
from tita.serve.async_engine import AsyncEngine, ParsedRequest
from tita.serve.errors import WORKER_PATH, APIError, broken, encodable, worker_piece
from tita.serve.images import image_from_base64
from tita.serve.openai_api import check_length, request_guidance
from tita.serve.scheduler import OutputQueue
from tita.serve.schemas import Form, Number, Plausibility, Weight
from tita.serve.streaming import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class GenerateRequest(BaseModel):
    """Body of `POST /worker_generate_stream`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    prompt: str
    images: Annotated[list[str], Field(max_length=64)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 50
    """What the original samples from where a client names no number."""
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    stop: str | None = None
    guidance_weight: Weight | None = None
    guidance_form: Form | None = None
    guidance_plausibility: Plausibility | None = None


class AddressRequest(BaseModel):
    """Body of `POST /get_worker_address`."""

    model: str


def router(serving: AsyncEngine) -> APIRouter:
    """The routes of the protocol; controller and only worker in one."""
    routes = APIRouter()
    names = [serving.options.name, serving.options.base_name]

    @routes.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": names}

    @routes.post("/refresh_all_workers")
    async def refresh() -> None:
        """Nothing to do: the models of this server never change."""

    @routes.post("/get_worker_address")
    async def address(body: AddressRequest, request: Request) -> dict[str, str]:
        # An unknown model has an empty address, as the controller has it.
        own = str(request.base_url).rstrip("/")
        return {"address": own if body.model in names else ""}

    @routes.post("/worker_get_status")
    async def status() -> dict[str, Any]:
        return {"model_names": names, "speed": 1, "queue_length": serving.num_requests}

    @routes.post(WORKER_PATH, response_class=Response)
    async def generate(body: GenerateRequest) -> Any:
        return Stream(_pieces(body, serving), media_type="application/octet-stream")

    return routes


async def _pieces(body: GenerateRequest, serving: AsyncEngine) -> AsyncGenerator[bytes, None]:
    pending: OutputQueue | None = None
    try:
        request_guidance(body, serving=serving)
        check_length(len(body.prompt), limits=serving.options.limits)
        pending = await serving.ask(lambda: _asked(body, serving))
        # Every piece repeats the prompt and the whole answer so far: clients cut at the prompt.
        text = body.prompt
        async for _, said in pending.said():
            text += said.text
            if said.text or said.finish_reason:
                yield worker_piece(text, error_code=0)
    except APIError as refusal:
        yield worker_piece(refusal.message, error_code=1)
    except Exception:
        logger.exception("a worker stream failed")
        yield worker_piece(broken().message, error_code=1)
    finally:
        if pending is not None:
            pending.cancel()


def _asked(body: GenerateRequest, serving: AsyncEngine) -> ParsedRequest:
    import secrets

    limits = serving.options.limits
    guidance = request_guidance(body, serving=serving)
    contents = body.images or []
    if len(contents) > limits.max_images:
        raise APIError(f"{len(contents)} images are more than {limits.max_images}")
    images = tuple(image_from_base64(content, limits=limits) for content in contents)
    sampling = Sampling(
        # The original cuts at 1024 without a word; so do we, at our own bound.
        max_new_tokens=min(body.max_new_tokens, limits.max_output_tokens),
        temperature=body.temperature if body.temperature > 0.001 else 0.0,
        top_p=body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
        seed=secrets.randbits(62),
        stops=(encodable(body.stop),) if body.stop else (),
    )
    prompt = encodable(body.prompt)

    def request(opened: "Sequence[Image]") -> EngineRequest:
        return EngineRequest(
            raw=prompt,
            images=tuple(opened),
            guidance=guidance,
            sampling=sampling,
        )

    return ParsedRequest(num_characters=len(prompt), images=images, request=request)
