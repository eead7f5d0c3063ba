"""From requests to model inputs, for base, reward and reference, with room for an answer."""

import copy
import dataclasses
import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.align.guidance import WITH_REFERENCE
from tita.align.options import EngineOptions
from tita.align.requests import Request
from tita.errors import TitaError
from tita.vlm import VLM, Inputs, decoded, prepare_alike, prepare_each


class PromptTooLong(TitaError):
    """The prompt leaves no room for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request whose prompt each model's processor has been through."""

    request: Request
    base: Inputs
    reward: Inputs | None
    """None where the reward model need not run along."""
    reference: Inputs | None = None
    """None where the form compares with no reference model."""
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
        self,
        base: VLM,
        reward: VLM | None = None,
        *,
        reference: VLM | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        """Args:
        base: the model that is steered.
        reward: the model that steers, if there is one.
        reference: the reward model before it was trained, if there is one.
        options: how to decode; the form and the longest prompt concern it.
        """
        self._base = base
        self._reward = reward
        self._reference = reference
        options = options or EngineOptions()
        self._form = options.form
        self._max_prompt_tokens = options.max_prompt_tokens
        self._reward_as_base = reward is not None and prepare_alike(base, reward)
        self._reference_as_reward = (
            reference is not None and reward is not None and prepare_alike(reward, reference)
        )
        if reward is not None and self._reward_as_base:
            self._reward = dataclasses.replace(reward, processor=base.processor)
        if reference is not None and self._reward is not None and self._reference_as_reward:
            self._reference = dataclasses.replace(reference, processor=self._reward.processor)
        # Fast tokenizers refuse to be used by two threads at once.
        self._lock = threading.Lock()

    def twin(self) -> "Preparer":
        """One that does the same with processors of its own: neither waits for the other."""
        copied: dict[int, Any] = {}

        def own(vlm: VLM) -> VLM:
            # By one memo, what models have in common is copied once.
            return dataclasses.replace(vlm, processor=copy.deepcopy(vlm.processor, copied))

        twin = copy.copy(self)
        twin._base = own(self._base)
        twin._reward = own(self._reward) if self._reward else None
        twin._reference = own(self._reference) if self._reference else None
        twin._lock = threading.Lock()
        return twin

    def prepare(self, request: Request) -> Prepared:
        """The request with its inputs.

        Raises:
            TitaError: an image cannot be read, the prompt is too long (`PromptTooLong`), or it
                cannot be said in a model's template (`BadConversation`).
        """
        return self._prepare([_opened(request)])[0]

    def prepare_all(self, requests: Sequence[Request]) -> list[Prepared | TitaError]:
        """As `prepare`, for many; what is wrong with one stands in its place.

        Many at once go through a processor faster than one by one.
        """
        if len(requests) > 1:
            try:
                return list(self._prepare([_opened(request) for request in requests]))
            except Exception:
                pass  # one of them cannot be prepared: find out which
        return [self._or_error(request) for request in requests]

    def _prepare(self, opened: Sequence[Request]) -> list[Prepared]:
        everyone = range(len(opened))
        guided = [n for n in everyone if opened[n].guided]
        compared = [n for n in guided if (opened[n].form or self._form) in WITH_REFERENCE]
        seen = [request.as_the_reward_sees_it for request in opened]
        with self._lock:
            base = _inputs(self._base, opened, everyone)
            as_base = [n for n in guided if self._reward_as_base and seen[n] is opened[n]]
            reward = _inputs(self._reward, seen, guided, made={n: base[n] for n in as_base})
            made = reward if self._reference_as_reward else {}
            reference = _inputs(self._reference, seen, compared, made=made)
        return [
            self._bounded(request, base[n], reward.get(n), reference.get(n))
            for n, request in enumerate(opened)
        ]

    def _or_error(self, request: Request) -> Prepared | TitaError:
        try:
            return self.prepare(request)
        except TitaError as error:
            return error

    def _bounded(
        self, request: Request, base: Inputs, reward: Inputs | None, reference: Inputs | None
    ) -> Prepared:
        room = request.sampling.max_new_tokens
        sides = ((self._base, base), (self._reward, reward), (self._reference, reference))
        for vlm, inputs in sides:
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
        image_digest = _digest(request)
        seen = request.as_the_reward_sees_it
        return Prepared(
            request=request,
            base=base,
            reward=reward,
            reference=reference,
            num_prompt_tokens=base["input_ids"].shape[1],
            max_new_tokens=room,
            image_digest=image_digest,
            reward_image_digest=image_digest if seen is request else _digest(seen),
        )


def _inputs(
    vlm: VLM | None,
    requests: Sequence[Request],
    places: Sequence[int],
    *,
    made: Mapping[int, Inputs] | None = None,
) -> dict[int, Inputs]:
    """What a model takes in for the requests at some places, by place; `made` need not be again."""
    found = {n: inputs for n, inputs in (made or {}).items() if n in places}
    left = [n for n in places if n not in found]
    if vlm is None or not left:
        return found
    return found | dict(
        zip(left, prepare_each(vlm, [requests[n].prompt for n in left]), strict=True)
    )


def context_length(vlm: VLM) -> int:
    """Tokens that one row can have at most."""
    config = vlm.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _opened(request: Request) -> Request:
    """The request with its files opened, as one that holds images."""

    def opened(parts: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(part if isinstance(part, str) else decoded(part) for part in parts)

    return dataclasses.replace(
        request,
        images=opened(request.images),
        turns=tuple(dataclasses.replace(t, parts=opened(t.parts)) for t in request.turns),
        reward_images=None if request.reward_images is None else opened(request.reward_images),
    )


def _digest(request: Request) -> str:
    pictures = request.prompt.pictures
    if not pictures:
        return ""
    digest = hashlib.sha256()
    for image in pictures:
        assert not isinstance(image, Path)
        digest.update(f"{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
