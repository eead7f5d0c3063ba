"""From requests to model inputs, for base, reward and reference model."""

import copy
import dataclasses
import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tita.align.failures import examine
from tita.align.requests import EngineOptions, Request
from tita.align.vocabulary import Vocabulary
from tita.errors import TitaError
from tita.vlm.images import Picture, decode_image
from tita.vlm.inputs import Inputs, prepare_alike, prepare_each
from tita.vlm.loading import Models
from tita.vlm.prompts import BadConversation, Prompt, prompt_text

_STRIP_ROWS = 128


class PromptTooLong(TitaError):
    """The prompt leaves no space for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request and its model inputs."""

    request: Request
    inputs: dict[str, Inputs]
    """By role, for the models that have to run; always `base`."""
    image_digests: dict[str, str]
    """By role: digest of the pixels of the images in order; empty without images."""
    num_prompt_tokens: int
    """Of the base model, image tokens included."""
    max_new_tokens: int
    """The requested number, or what the context leaves."""


class Preparer:
    """Runs prompts through the models' processors. Thread-safe."""

    def __init__(
        self,
        models: Models,
        options: EngineOptions | None = None,
        *,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Args:
        models: their processors are used; a processor that would repeat another's work is not.
        options: `max_prompt_tokens` applies.
        vocabulary: maps the reward model's token ids to the base model's, if they differ.
        """
        self._vocabulary = vocabulary
        self._max_prompt_tokens = (options or EngineOptions()).max_prompt_tokens
        self._vlms = models.by_role()
        self._shares_inputs: set[str] = set()
        """Roles whose inputs equal those of the role before: the reward's the base's, and so on."""
        for role, other in (("reward", "base"), ("reference", "reward")):
            vlm, first = self._vlms.get(role), self._vlms.get(other)
            if vlm is not None and first is not None and prepare_alike(first, vlm):
                self._vlms[role] = dataclasses.replace(vlm, processor=first.processor)
                self._shares_inputs.add(role)
        # Fast tokenizers raise when two threads use them at once.
        self._lock = threading.Lock()

    def clone(self) -> "Preparer":
        """A preparer with its own copy of the processors, for another thread."""
        clone = copy.copy(self)
        # With one memo, a processor that models share is copied once.
        processors = copy.deepcopy({role: vlm.processor for role, vlm in self._vlms.items()})
        clone._vlms = {
            role: dataclasses.replace(vlm, processor=processors[role])
            for role, vlm in self._vlms.items()
        }
        clone._lock = threading.Lock()
        return clone

    def prepare(self, request: Request) -> PreparedRequest:
        """The request with its inputs.

        Raises:
            TitaError: an image cannot be read, the prompt is too long (`PromptTooLong`), or a
                model's template does not accept it (`BadConversation`).
        """
        return self._prepare([_with_open_images(request)])[0]

    def prepare_all(self, requests: Sequence[Request]) -> list[PreparedRequest | TitaError]:
        """As `prepare`, for a batch, which is faster than one by one; an error takes its place."""
        if len(requests) > 1:
            try:
                return list(self._prepare([_with_open_images(request) for request in requests]))
            except Exception:
                pass  # one of them fails: find out which
        prepared: list[PreparedRequest | TitaError] = []
        for request in requests:
            try:
                prepared.append(self.prepare(request))
            except Exception as error:
                prepared.append(examine(error).error)
        return prepared

    def token_ids(self, request: Request, *, add_special_tokens: bool = True) -> list[int]:
        """The base model's tokens of a request's prompt, of any length; image tokens included.

        Args:
            add_special_tokens: whether a `raw` prompt gets a beginning-of-text token.

        Raises:
            TitaError: an image cannot be read, or the model's template does not accept the prompt.
        """
        vlm = self._vlms["base"]
        with self._lock:
            if request.raw is not None and not add_special_tokens:
                text = prompt_text(vlm.processor, request.prompt, where=vlm.name)
                ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
                return [int(token) for token in ids]
            inputs = self._inputs("base", [_with_open_images(request)], [0])[0]
        return [int(token) for token in inputs["input_ids"][0]]

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The names of the base model's tokens in its vocabulary."""
        with self._lock:
            return list(map(str, self._vlms["base"].tokenizer.convert_ids_to_tokens(token_ids)))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens of the base model, special tokens included.

        Raises:
            BadConversation: there is no such token.
        """
        tokenizer = self._vlms["base"].tokenizer
        for token in token_ids:
            if not 0 <= token < len(tokenizer):
                raise BadConversation(
                    f"there is no token {token}; the last is {len(tokenizer) - 1}"
                )
        with self._lock:
            return str(tokenizer.decode(token_ids))

    def _prepare(self, requests: Sequence[Request]) -> list[PreparedRequest]:
        views = [request.reward_view for request in requests]
        guided = [n for n, request in enumerate(requests) if request.guided]
        compared = [n for n in guided if requests[n].guidance.needs_reference]
        with self._lock:
            base = self._inputs("base", requests, range(len(requests)))
            same = {n: base[n] for n in guided if views[n] is requests[n]}
            reward = self._inputs("reward", views, guided, same=same)
            reference = self._inputs("reference", views, compared, same=reward)
        sides = {"base": base, "reward": reward, "reference": reference}
        return [
            self._bounded(request, {role: each[n] for role, each in sides.items() if n in each})
            for n, request in enumerate(requests)
        ]

    def _inputs(
        self,
        role: str,
        requests: Sequence[Request],
        numbers: Iterable[int],
        *,
        same: Mapping[int, Inputs] | None = None,
    ) -> dict[int, Inputs]:
        """Inputs of one model for the requests of these numbers.

        Args:
            role: of the model; no inputs if there is none.
            requests: as this model sees them.
            numbers: indices into `requests`.
            same: inputs of the role before, taken over if this role shares them.
        """
        if role not in self._vlms:
            return {}
        found = (
            {n: same[n] for n in numbers if n in same}
            if role in self._shares_inputs and same
            else {}
        )
        left = [n for n in numbers if n not in found]
        if left:
            prompts = [self._prompt(role, requests[n]) for n in left]
            found |= dict(zip(left, prepare_each(self._vlms[role], prompts), strict=True))
        return found

    def _prompt(self, role: str, request: Request) -> Prompt:
        prompt = request.prompt
        if role == "base" or self._vocabulary is None:
            return prompt
        # Token ids are the base model's; the reward reads them as it reads those of an answer.
        reads = self._vocabulary.reads
        return dataclasses.replace(prompt, token_ids=tuple(reads[id] for id in prompt.token_ids))

    def _bounded(self, request: Request, inputs: dict[str, Inputs]) -> PreparedRequest:
        """Check the prompt's length, and bound the answer's.

        Raises:
            PromptTooLong: it is longer than allowed.
        """
        max_new_tokens = request.sampling.max_new_tokens
        for role, each in inputs.items():
            vlm = self._vlms[role]
            length, context = each["input_ids"].shape[1], vlm.context_length
            longest = min(self._max_prompt_tokens or context, context - 1)
            if length > longest:
                raise PromptTooLong(
                    f"the prompt has {length} tokens, more than {longest}",
                    where=vlm.name,
                    remedy="shorten it or give fewer images",
                )
            max_new_tokens = min(max_new_tokens, context - length)
        digest = _image_digest(request)
        view = request.reward_view
        steering = digest if view is request else _image_digest(view)
        return PreparedRequest(
            request=request,
            inputs=inputs,
            image_digests={role: digest if role == "base" else steering for role in inputs},
            num_prompt_tokens=inputs["base"]["input_ids"].shape[1],
            max_new_tokens=max_new_tokens,
        )


def _with_open_images(request: Request) -> Request:
    """The request with its image files opened and decoded."""

    def opened(pictures: Iterable[Picture | str]) -> tuple[Picture, ...]:
        return tuple(map(decode_image, pictures))

    turns = tuple(
        dataclasses.replace(
            turn,
            parts=tuple(p if isinstance(p, str) else decode_image(p) for p in turn.parts),
        )
        for turn in request.turns
    )
    return dataclasses.replace(
        request,
        images=opened(request.images),
        turns=turns,
        reward_images=None if request.reward_images is None else opened(request.reward_images),
    )


def _image_digest(request: Request) -> str:
    pictures = request.prompt.pictures
    if not pictures:
        return ""
    digest = hashlib.sha256()
    for image in pictures:
        assert not isinstance(image, Path)
        digest.update(f"{image.size}".encode())
        # In strips, because a copy of the whole would hold Python's global lock for long.
        for top in range(0, image.height, _STRIP_ROWS):
            bottom = min(top + _STRIP_ROWS, image.height)
            digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.hexdigest()
