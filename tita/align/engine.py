"""The engine: requests in, answers or tokens out."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, overload

from tita.align.batch import Batch
from tita.align.best_of import check_best_of, choices_of, ranking, score
from tita.align.failures import examine
from tita.align.kv_cache import PrefixCache, check_cacheable
from tita.align.prompts import PreparedRequest, Preparer
from tita.align.requests import (
    Answer,
    EngineOptions,
    Outcome,
    Request,
    Token,
    TokenOutput,
    is_last,
)
from tita.align.speculative import DraftPolicy
from tita.align.vocabulary import match_vocabularies
from tita.errors import TitaError
from tita.vlm.inputs import check_image_token
from tita.vlm.loading import Models
from tita.vlm.packing import pack_large, pack_linears


class Engine:
    """Answers requests with a base model that a reward model steers. Not thread-safe.

    The models are of one family; `tita.align.vocabulary` maps token ids that differ.

    The demo's models, asked about a picture of a 2 and a 5:

        >>> import PIL.Image
        >>> from tita.align import Engine, Guidance, Request
        >>> from tita.demo.models import demo_model_path
        >>> from tita.demo.scenes import make_scenes
        >>> from tita.vlm.loading import Models, load_vlm
        >>> models = Models(*(load_vlm(str(demo_model_path(role))) for role in ("base", "reward")))
        >>> engine = Engine(models)
        >>> scene = make_scenes("validation", number=3)[-1]
        >>> image = PIL.Image.fromarray((255 * scene.pixels).round().astype("uint8"))
        >>> alone, aligned = engine.generate([
        ...     Request(
        ...         question="Is there a 3 in the image?",
        ...         images=(image,),
        ...         guidance=Guidance(weight=weight),
        ...     )
        ...     for weight in (0, 0.5)
        ... ])
        >>> alone.text, aligned.text, aligned.num_changed
        ('yes', 'no', 1)
    """

    def __init__(self, models: Models, options: EngineOptions | None = None) -> None:
        """Args:
            models: the loaded models. Large float32 models on a CPU are packed in place
                (`tita.vlm.packing`) unless the options say otherwise.
            options: the same for all requests.

        Raises:
            TitaError: the vocabularies differ too much, a model keeps more than keys and values
                between tokens, or it does not say which token stands for images.
        """
        self.models = models
        self.options = options or EngineOptions()
        for vlm in models.by_role().values():
            check_cacheable(vlm.model.config, vlm.model.forward, where=vlm.name)
            check_image_token(vlm.model.config, where=vlm.name)
        self._vocabularies = match_vocabularies(models)
        if self.options.pack is not False:
            for vlm in models.by_role().values():
                (pack_large if self.options.pack is None else pack_linears)(vlm)
        for vlm in models.by_role().values():
            if vlm.adapters is not None:
                vlm.adapters.limit(self.options.max_adapters)
        self.preparer = Preparer(models, self.options, vocabularies=self._vocabularies.maps)
        self.draft_policy = DraftPolicy(max_drafts=self.options.max_drafts)
        self._prefix_cache = PrefixCache(self.options.prefix_cache_bytes)

    @overload
    def generate(self, requests: Sequence[Request]) -> list[Answer]: ...

    @overload
    def generate(
        self, requests: Sequence[Request], *, return_errors: Literal[True]
    ) -> list[Answer | TitaError]: ...

    def generate(self, requests: Sequence[Request], *, return_errors: bool = False) -> Any:
        """Answer a batch; the answers are in the order of the requests.

        Args:
            requests: of any lengths, guidance and sampling.
            return_errors: return the error of a request that has no answer in its place.

        Raises:
            TitaError: the first error, after all others are answered, unless errors are returned.
        """
        answers: list[Answer | TitaError] = [TitaError("no answer") for _ in requests]
        for number, answer in self.generate_as_completed(requests, batch_size=len(requests)):
            answers[number] = answer
        if return_errors:
            return answers
        for answer in answers:
            if isinstance(answer, TitaError):
                raise answer
        return answers

    def generate_as_completed(
        self, requests: Iterable[Request], *, batch_size: int
    ) -> Iterator[tuple[int, Answer | TitaError]]:
        """Answer any number of requests, `batch_size` at a time: a new one starts as one ends.

        Yields:
            The number of a request and its answer or error, as they are completed.
        """
        outputs: dict[int, list[TokenOutput]] = {}
        for number, prepared, outcome in self._outcomes(requests, batch_size=batch_size):
            if prepared is None or isinstance(outcome, TitaError):
                assert isinstance(outcome, TitaError)
                outputs.pop(number, None)
                yield number, outcome
                continue
            outputs.setdefault(number, []).append(outcome)
            if outcome.finish_reason is not None:
                yield number, _answer(prepared, outputs.pop(number))

    def best_of(self, requests: Sequence[Request], number: int) -> list[Answer]:
        """The best of n sampled answers to each request, by the reward models' implicit reward.

        Args:
            requests: the base alone answers them if their guidance weight is 0.
            number: n. Their seeds are those of the request and the n - 1 after it.

        Raises:
            TitaError: a request has no answer, or all answers would be the same.
        """
        rewards, batch = tuple(self.models.rewards), self.new_batch()
        prepared: dict[tuple[int, int], PreparedRequest] = {}
        for index, request in enumerate(requests):
            check_best_of(number, temperature=request.sampling.temperature, rewards=rewards)
            scored = dataclasses.replace(request, score=bool(rewards))
            for choice, each in enumerate(choices_of(self.preparer.prepare(scored), number)):
                prepared[index, choice] = each
                batch.admit((index, choice), each)
        outputs: dict[Any, list[TokenOutput]] = {key: [] for key in prepared}
        while len(batch):
            for key, outcome in batch.step():
                if isinstance(outcome, TitaError):
                    raise outcome
                outputs[key].append(outcome)
        answers = []
        for index in range(len(requests)):
            scores = [score(outputs[index, choice]) for choice in range(number)]
            best = ranking(scores)[0]
            answer = _answer(prepared[index, best], outputs[index, best])
            answers.append(dataclasses.replace(answer, scores=tuple(scores)))
        return answers

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        """Answer a batch token by token.

        Yields:
            The number of a request, and its next token or the error that ended it; tokens of one
            request in order, those of several as they come. The last has a `finish_reason`.
        """
        for number, _, outcome in self._outcomes(requests, batch_size=len(requests)):
            yield number, outcome

    def new_batch(self) -> Batch:
        """An empty batch of these models, for a caller that drives its steps itself."""
        return Batch(
            self.models,
            self.options,
            vocabularies=self._vocabularies,
            prefix_cache=self._prefix_cache,
            draft_policy=self.draft_policy,
        )

    def close(self) -> None:
        """End the processes of the engine; this one has none."""

    def _outcomes(
        self, requests: Iterable[Request], *, batch_size: int
    ) -> Iterator[tuple[int, PreparedRequest | None, Outcome]]:
        """Each token of each request, or the error that ended it."""
        batch = self.new_batch()
        waiting = enumerate(requests)
        running: dict[int, PreparedRequest] = {}
        while True:
            new = list(islice(waiting, batch_size - len(batch)))
            prepared = self.preparer.prepare_all([request for _, request in new])
            for (number, _), each in zip(new, prepared, strict=True):
                if isinstance(each, TitaError):
                    yield number, None, each
                    continue
                try:
                    batch.admit(number, each)
                except Exception as error:
                    yield number, each, examine(error).error
                else:
                    running[number] = each
            if not len(batch) and not new:
                return
            for key, outcome in batch.step():
                number = int(str(key))
                yield number, running[number], outcome
                if is_last(outcome):
                    del running[number]


def _answer(prepared: PreparedRequest, outputs: Sequence[TokenOutput]) -> Answer:
    return Answer(
        text="".join(each.text for each in outputs).strip(),
        token_ids=tuple(each.id for each in outputs if each.counted),
        finish_reason=outputs[-1].finish_reason or "stop",
        num_prompt_tokens=prepared.num_prompt_tokens,
        num_changed=sum(each.changed for each in outputs),
        tokens=tuple(map(_token, outputs)) if prepared.request.explain else (),
    )


def _token(output: TokenOutput) -> Token:
    assert output.base is not None
    assert output.logprob is not None
    return Token(
        id=output.id,
        text=output.token,
        base=output.base,
        reward=output.reward,
        combined=output.logprob,
        changed=output.changed,
        terms=output.terms,
    )
