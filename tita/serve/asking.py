"""From a chat request of the wire to the engine's: models, weights, turns, images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tita.align import Request, Sampling, Turn
from tita.serve.beyond import unsupported
from tita.serve.failures import Refusal, encodable, too_long
from tita.serve.images import EncodedImage, image_from_url
from tita.serve.options import Limits
from tita.serve.preparing import Asked
from tita.serve.schemas import ChatRequest, Message, TextPart
from tita.serve.serving import Serving

if TYPE_CHECKING:
    from PIL.Image import Image


def check(body: ChatRequest, *, serving: Serving) -> None:
    """Look at all that can be seen without opening an image.

    Raises:
        Refusal: something in it cannot be done.
    """
    if name := unsupported(body.model_extra or {}):
        raise Refusal(f"{name} is not supported", param=name, code="unsupported")
    guidance_weight(body.model, body.guidance_weight, serving=serving)
    guidance_form(body.guidance_form, serving=serving)
    limits = serving.options.limits
    _check_counts(body, serving=serving)
    parts = [part for message in body.messages for part in message.parts]
    check_length(sum(len(part.text) for part in parts if isinstance(part, TextPart)), limits=limits)
    num_images = sum(not isinstance(part, TextPart) for part in parts)
    if num_images > limits.max_images:
        raise Refusal(
            f"{num_images} images are more than {limits.max_images}",
            param="messages", code="too_many_images",
        )  # fmt: skip


def check_length(num_characters: int, *, limits: Limits) -> None:
    """Look at a prompt's length before anything is done with it.

    Raises:
        Refusal: its tokens are too many, however they are counted.
    """
    if num_characters > limits.max_prompt_characters:
        most = limits.max_prompt_characters
        raise too_long(f"the prompt has {num_characters:,} characters, more than {most:,}")


def asked_from(body: ChatRequest, *, serving: Serving) -> Asked:
    """What the client asks the engine for. Blocks while it fetches images.

    Raises:
        Refusal: an image cannot be had.
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
            weight=guidance_weight(body.model, body.guidance_weight, serving=serving),
            form=guidance_form(body.guidance_form, serving=serving),
            plausibility=plausibility(body.guidance_plausibility, serving=serving),
            sampling=_sampling(body, serving=serving),
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
            explain=bool(body.explain),
        )

    return Asked(
        num_characters=sum(len(part) for part in parts if isinstance(part, str)),
        images=tuple(part for part in parts if not isinstance(part, str)),
        request=request,
    )


def guidance_weight(model: str, wanted: float | None, *, serving: Serving) -> float:
    """The weight that a request for `model` is guided by.

    Raises:
        Refusal: no such model, or a weight that it cannot be guided by.
    """
    options = serving.options
    if model == options.base_name:
        if wanted:
            raise Refusal(f"{model} is not guided; ask {options.name}", param="guidance_weight")
        return 0.0
    if model != options.name:
        raise Refusal(
            f"no model {model!r}; there are {options.name} and {options.base_name}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
    if wanted is None:
        return options.weight if serving.guided else 0.0
    if wanted and not serving.guided:
        raise Refusal("the server has no reward model to guide with", param="guidance_weight")
    return wanted


def guidance_form(wanted: str | None, *, serving: Serving) -> str:
    """The form that a request is guided by.

    Raises:
        Refusal: no such form, or none that this server's models can do.
    """
    form = wanted or serving.options.form
    if form not in serving.forms:
        known = ", ".join(serving.forms)
        raise Refusal(f"no guidance form {form!r} here; there are {known}", param="guidance_form")
    return form


def plausibility(wanted: float | None, *, serving: Serving) -> float:
    """The plausibility bound that a request is guided within."""
    return serving.options.plausibility if wanted is None else wanted


def _check_counts(body: ChatRequest, *, serving: Serving) -> None:
    limits = serving.options.limits
    if (body.wanted_tokens or 0) > limits.max_output_tokens:
        raise Refusal(
            f"{body.wanted_tokens} output tokens are more than {limits.max_output_tokens}",
            param="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
        )
    most = min(limits.max_choices, serving.options.max_batch + serving.options.max_waiting)
    if (body.n or 1) > most:
        raise Refusal(f"n is at most {most}", param="n")
    if body.stream_options and not body.stream:
        raise Refusal("stream_options needs stream", param="stream_options")
    if body.top_logprobs and not body.logprobs:
        raise Refusal("top_logprobs needs logprobs", param="top_logprobs")


def _sampling(body: ChatRequest, *, serving: Serving) -> Sampling:
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


def _parts(message: Message, number: int, serving: Serving) -> list[str | EncodedImage]:
    parts: list[str | EncodedImage] = []
    for place, part in enumerate(message.parts):
        if isinstance(part, TextPart):
            parts.append(encodable(part.text))
            continue
        param = f"messages.{number}.content.{place}.image_url"
        if message.role != "user":
            raise Refusal("only a user's message has images", param=param)
        parts.append(
            image_from_url(
                part.image_url.url,
                limits=serving.options.limits,
                fetcher=serving.fetcher,
                param=param,
            )
        )
    return parts
