"""From requests to model inputs: of every source that guidance needs, model by model."""

import copy
import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tita.align.failures import examine
from tita.align.forms import BASE, REFERENCE, Source, Term, View
from tita.align.requests import EngineOptions, Request
from tita.align.views import (
    as_seen,
    distort_inputs,
    image_digest,
    seen_digest,
    sees_others,
    undistorted,
)
from tita.align.vocabulary import Vocabulary
from tita.errors import TitaError
from tita.vlm.images import Picture, decode_image
from tita.vlm.inputs import Inputs, prepare, prepare_alike, prepare_each
from tita.vlm.loading import Models
from tita.vlm.prompts import Prompt, check_known, prompt_text


class PromptTooLong(TitaError):
    """The prompt leaves no space for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request and its model inputs."""

    request: Request
    terms: tuple[Term, ...] = ()
    """What guidance adds to the base model's log-probabilities."""
    inputs: dict[str, Inputs]
    """By name of the source, for those that have to run; always `base`."""
    image_digests: dict[str, str]
    """By name of the source: digest of its images in order; empty without images."""
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
        vocabularies: Mapping[str, Vocabulary] | None = None,
    ) -> None:
        """Args:
        models: their processors are used; a processor that would repeat another's work is not.
        options: `max_prompt_tokens` and `max_model_len` apply.
        vocabularies: the maps of models whose token ids differ from the base's, by role.
        """
        self._vocabularies = vocabularies or {}
        self._options = options or EngineOptions()
        self._vlms = models.by_role()
        self._rewards = tuple(models.rewards)
        self._preparer_of: dict[str, str] = {}
        """By role: the first model that makes the same inputs of every prompt, or itself."""
        for role, vlm in self._vlms.items():
            alike = (each for each in self._preparer_of if prepare_alike(self._vlms[each], vlm))
            self._preparer_of[role] = first = next(alike, role)
            self._vlms[role] = dataclasses.replace(vlm, processor=self._vlms[first].processor)
        longest = self._options.max_model_len
        self._contexts = {
            role: min(longest or vlm.context_length, vlm.context_length)
            for role, vlm in self._vlms.items()
        }
        # Fast tokenizers raise when two threads use them at once.
        self._lock = threading.Lock()

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together, if all models run."""
        return min(self._contexts.values())

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
            inputs = prepare(vlm, [_with_open_images(request).prompt])
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
        check_known(tokenizer, token_ids)
        with self._lock:
            return str(tokenizer.decode(token_ids))

    def _prepare(self, requests: Sequence[Request]) -> list[PreparedRequest]:
        terms = [self._terms(request) for request in requests]
        sources = [self._sources(*each) for each in zip(requests, terms, strict=True)]
        inputs: list[dict[str, Inputs]] = [{} for _ in requests]
        known: dict[tuple[str, View, bool, int], Inputs] = {}
        with self._lock:
            for source in dict.fromkeys(each for some in sources for each in some):
                first, clean = self._preparer_of[source.model], undistorted(source.view)
                keys = {
                    n: (first, clean, source.model != "base" and sees_others(request), n)
                    for n, request in enumerate(requests)
                    if source in sources[n]
                }
                left = [n for n, key in keys.items() if key not in known]
                seen = [as_seen(requests[n], source) for n in left]
                made = self._inputs(source.model, seen) if left else []
                known |= {keys[n]: each for n, each in zip(left, made, strict=True)}
                for n, key in keys.items():
                    inputs[n][source.name] = distort_inputs(known[key], requests[n], source.view)
        return [
            self._bounded(request, each, some, found)
            for request, each, some, found in zip(requests, terms, sources, inputs, strict=True)
        ]

    def _terms(self, request: Request) -> tuple[Term, ...]:
        """The terms of a request's guidance.

        Raises:
            TitaError: they need a model that is not loaded.
        """
        has_images = bool(request.prompt.pictures)
        terms = request.guidance.terms(self._rewards, has_images=has_images)
        if "reference" not in self._vlms and any(each.against == REFERENCE for each in terms):
            raise TitaError(
                f"form {request.guidance.form} without a reference model",
                remedy="give the reward model as it was before DPO, or choose another form",
            )
        return terms

    def _sources(self, request: Request, terms: Sequence[Term]) -> tuple[Source, ...]:
        """The sources of a request, each once; the base as it is first."""
        found = [BASE]
        for term in terms:
            found += [term.source] if term.against is None else [term.source, term.against]
        if request.score:
            found += [Source(name) for name in self._rewards]
            found += [REFERENCE] if "reference" in self._vlms else []
        elif request.explain and request.guidance.uses_rewards:
            names = request.guidance.reward_weights(self._rewards) or self._rewards
            found += [Source(name) for name in names]
        return tuple(dict.fromkeys(found))

    def _inputs(self, role: str, seen: Sequence[Request]) -> list[Inputs]:
        """Inputs of one model for requests as it sees them, without noise."""
        return prepare_each(self._vlms[role], [self._prompt(role, each) for each in seen])

    def _prompt(self, role: str, request: Request) -> Prompt:
        prompt = request.prompt
        vocabulary = self._vocabularies.get(role)
        if vocabulary is None:
            return prompt
        # Token ids are the base model's; the reward reads them as it reads those of an answer.
        return dataclasses.replace(
            prompt, token_ids=tuple(vocabulary.reads[id] for id in prompt.token_ids)
        )

    def _bounded(
        self,
        request: Request,
        terms: tuple[Term, ...],
        sources: Sequence[Source],
        inputs: dict[str, Inputs],
    ) -> PreparedRequest:
        """Check the prompt's length, and bound the answer's.

        Raises:
            PromptTooLong: it is longer than allowed.
        """
        max_new_tokens = request.sampling.max_new_tokens
        for source in sources:
            length = inputs[source.name]["input_ids"].shape[1]
            context = self._contexts[source.model]
            longest = min(self._options.max_prompt_tokens or context, context - 1)
            if length > longest:
                raise PromptTooLong(
                    f"the prompt has {length} tokens, more than {longest}",
                    where=self._vlms[source.model].name,
                    remedy="shorten it or give fewer images",
                )
            max_new_tokens = min(max_new_tokens, context - length)
        own = image_digest(request)
        others = image_digest(request.reward_view) if sees_others(request) else own
        return PreparedRequest(
            request=request,
            terms=terms,
            inputs=inputs,
            image_digests={
                source.name: seen_digest(own if source.model == "base" else others, source.view)
                for source in sources
            },
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
