"""From requests to model inputs: each model's own chat template, image tokens, image processor."""

import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tita.align.requests import Picture, Request
from tita.errors import TitaError
from tita.vlm import VLM, open_image, pad_to_square

if TYPE_CHECKING:
    from PIL.Image import Image

Inputs = dict[str, Any]
"""What a model's processor makes of one prompt: `input_ids[1, L]`, `attention_mask[1, L]`, and the
model's image tensors."""


class PromptTooLong(TitaError):
    """The prompt leaves no room for an answer."""


class BadConversation(TitaError):
    """The model's template cannot say this, or its image marks and images do not match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request whose prompt each model's processor has been through."""

    request: Request
    base: Inputs
    reward: Inputs | None
    num_prompt_tokens: int
    """Of the base model, image tokens included."""
    max_new_tokens: int
    """As many as were asked for, or fit into the context."""
    image_digest: str = ""
    """Of the base's images' pixels, in order; empty without images."""
    reward_image_digest: str = ""


class Preparer:
    """Runs prompts through the processors; any thread may call it."""

    def __init__(
        self, base: VLM, reward: VLM | None = None, *, max_prompt_tokens: int | None = None
    ) -> None:
        """Args:
        base: the model that is steered.
        reward: the model that steers, if there is one.
        max_prompt_tokens: longest prompt taken, image tokens included; the context if not given.
        """
        self._base = base
        self._reward = reward
        self._max_prompt_tokens = max_prompt_tokens
        # Fast tokenizers refuse to be used by two threads at once.
        self._lock = threading.Lock()

    def prepare(self, request: Request) -> Prepared:
        """The request with its inputs.

        Raises:
            TitaError: an image cannot be read, the prompt is too long (`PromptTooLong`), or it
                cannot be said in a model's template (`BadConversation`).
        """
        opened = _opened(request)
        with self._lock:
            base = _inputs(self._base, [opened])[0]
            reward = None
            if self._reward is not None and request.guided:
                reward = _inputs(self._reward, [opened.as_the_reward_sees_it])[0]
        return self._bounded(opened, base, reward)

    def prepare_all(self, requests: Sequence[Request]) -> list[Prepared | TitaError]:
        """As `prepare`, for many; what is wrong with one stands in its place.

        Many at once go through a processor faster than one by one.
        """
        if len(requests) > 1:
            try:
                return self._prepare_together(requests)
            except Exception:
                pass  # one of them cannot be prepared: find out which
        return [self._or_error(request) for request in requests]

    def _prepare_together(self, requests: Sequence[Request]) -> list[Prepared | TitaError]:
        opened = [_opened(request) for request in requests]
        rewards: dict[int, Inputs] = {}
        with self._lock:
            bases = _inputs(self._base, opened)
            if self._reward is not None:
                guided = [n for n, request in enumerate(opened) if request.guided]
                seen = [opened[n].as_the_reward_sees_it for n in guided]
                rewards = dict(zip(guided, _inputs(self._reward, seen), strict=True))
        return [
            self._bounded(request, bases[n], rewards.get(n)) for n, request in enumerate(opened)
        ]

    def _or_error(self, request: Request) -> Prepared | TitaError:
        try:
            return self.prepare(request)
        except TitaError as error:
            return error

    def _bounded(self, request: Request, base: Inputs, reward: Inputs | None) -> Prepared:
        room = request.sampling.max_new_tokens
        for vlm, inputs in ((self._base, base), (self._reward, reward)):
            if vlm is None or inputs is None:
                continue
            length, context = inputs["input_ids"].shape[1], context_length(vlm)
            longest = min(self._max_prompt_tokens or context, context - 1)
            if length > longest:
                raise PromptTooLong(
                    f"the prompt has {length} tokens, more than {longest}",
                    where=vlm.name,
                    remedy="shorten it or give fewer images",
                )
            room = min(room, context - length)
        return Prepared(
            request=request,
            base=base,
            reward=reward,
            num_prompt_tokens=base["input_ids"].shape[1],
            max_new_tokens=room,
            image_digest=_digest(request),
            reward_image_digest=_digest(request.as_the_reward_sees_it) if reward else "",
        )


def context_length(vlm: VLM) -> int:
    """Tokens that one row can have at most."""
    config = vlm.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _opened(request: Request) -> Request:
    """The request with its files opened, as one that holds images."""

    def opened(parts: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(part if isinstance(part, str) else _decoded(part) for part in parts)

    return dataclasses.replace(
        request,
        images=opened(request.images),
        turns=tuple(dataclasses.replace(t, parts=opened(t.parts)) for t in request.turns),
        reward_images=None if request.reward_images is None else opened(request.reward_images),
    )


def _decoded(picture: Picture) -> "Image":
    if isinstance(picture, Path):
        return open_image(picture)
    try:
        # Pillow decodes when pixels are wanted first, which is too late to tell whose they are.
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise TitaError(f"an image cannot be read ({error})", remedy="replace it") from None
    return picture


def _inputs(vlm: VLM, requests: Sequence[Request]) -> list[Inputs]:
    """Each request's inputs on the model's device, from as few calls as its tensors allow."""
    if not requests:
        return []
    raw = requests[0].raw is not None
    num_pictures = len(requests[0].pictures)
    alike = num_pictures <= 1 and all(
        (len(request.pictures), request.raw is not None) == (num_pictures, raw)
        for request in requests
    )
    if len(requests) > 1 and alike:
        together = _processed(vlm, requests)
        if all(len(tensor) == len(requests) for tensor in together.values()):
            return _rows(together)
    return [_processed(vlm, [request]) for request in requests]


def _processed(vlm: VLM, requests: Sequence[Request]) -> Inputs:
    images = [[_aspect(vlm, image) for image in request.pictures] for request in requests]
    inputs = vlm.processor(
        text=[_text(vlm, request) for request in requests],
        images=images if any(images) else None,
        # A template has put the beginning-of-text token where the model wants it.
        add_special_tokens=requests[0].raw is not None,
        padding=len(requests) > 1,
        padding_side="left",
        return_tensors="pt",
    )
    return dict(inputs.to(vlm.device))


def _rows(together: Inputs) -> list[Inputs]:
    """A batch's inputs row by row, without padding."""
    shape = together["input_ids"].shape
    lengths = together["attention_mask"].sum(-1).tolist()
    return [
        {
            name: tensor[n : n + 1, -length:] if tensor.shape == shape else tensor[n : n + 1]
            for name, tensor in together.items()
        }
        for n, length in enumerate(lengths)
    ]


def _aspect(vlm: VLM, image: "Picture") -> "Image":
    assert not isinstance(image, Path)
    return pad_to_square(image) if vlm.image_aspect == "pad" else image


def _text(vlm: VLM, request: Request) -> str:
    return _templated(vlm, request) if request.raw is None else _raw_text(vlm, request)


def _templated(vlm: VLM, request: Request) -> str:
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": _disarmed(vlm, part)}
                if isinstance(part, str)
                else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in request.conversation
    ]
    try:
        text: str = vlm.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        # Templates raise where a model knows no such role or order of turns.
        raise BadConversation(
            f"the model's chat template takes no such conversation ({error})"
        ) from None
    if text.count(vlm.processor.image_token) != len(request.pictures):
        raise BadConversation("the model's chat template takes no images here")
    return text


def _raw_text(vlm: VLM, request: Request) -> str:
    assert request.raw is not None
    marks = request.raw.count("<image>")
    if marks != len(request.pictures):
        raise BadConversation(
            f"number of images ({len(request.pictures)}) does not match number of <image> tokens "
            f"in prompt ({marks})"
        )
    pieces = [_disarmed(vlm, piece) for piece in request.raw.split("<image>")]
    return str(vlm.processor.image_token).join(pieces)


def _disarmed(vlm: VLM, text: str) -> str:
    """The asker's words with a blank inside whatever the model takes for a control token."""
    marks = {*vlm.tokenizer.all_special_tokens, vlm.processor.image_token}
    for mark in marks:
        if len(mark) > 1:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def _digest(request: Request) -> str:
    if not request.pictures:
        return ""
    digest = hashlib.sha256()
    for image in request.pictures:
        assert not isinstance(image, Path)
        digest.update(f"{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
