"""The engine: base and reward model step by step, for whoever asks in this process."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, overload

from tita.align.answers import Answer, Outcome, Said, Token, is_last
from tita.align.cache import check_cacheable
from tita.align.drafting import Drafting
from tita.align.guidance import check_reference
from tita.align.options import EngineOptions
from tita.align.prefixes import PrefixCache
from tita.align.preparing import Prepared, Preparer
from tita.align.requests import Request
from tita.align.stepper import Stepper
from tita.align.vocabulary import match_vocabularies
from tita.errors import TitaError
from tita.vlm import VLM


class Engine:
    """Answers questions with a base model that a reward model guides.

    The models are of one family: what is to be told apart between their vocabularies is told by
    `tita.align.vocabulary`. Not thread-safe.

    The demo's models, asked about a picture of a 2 and a 5:

        >>> import PIL.Image
        >>> from tita.align import Engine, Request
        >>> from tita.demo.models import demo_model_path
        >>> from tita.demo.scenes import make_scenes
        >>> from tita.vlm import load_vlm
        >>> engine = Engine(*(load_vlm(str(demo_model_path(role))) for role in ("base", "reward")))
        >>> scene = make_scenes("validation", number=3)[-1]
        >>> image = PIL.Image.fromarray((255 * scene.pixels).round().astype("uint8"))
        >>> asked = {"question": "Is there a 3 in the image?", "images": (image,)}
        >>> alone, aligned = engine.generate([Request(weight=w, **asked) for w in (0, 0.5)])
        >>> alone.text, aligned.text, aligned.num_changed
        ('yes', 'no', 1)
    """

    def __init__(
        self,
        base: VLM,
        reward: VLM | None = None,
        *,
        reference: VLM | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        """Args:
            base: the frozen model that is steered.
            reward: the model that steers; without one, only weight 0 can be asked for.
            reference: the reward model before it was trained, for forms that compare with it.
            options: how to decode. Large float32 models on a CPU are packed
                (`tita.align.packing`) unless they say otherwise.

        Raises:
            TitaError: the vocabularies differ, a model keeps more than keys and values of its
                tokens, or the form takes a reference and none is given.
        """
        self.options = options or EngineOptions()
        check_reference(self.options.form, there=reference is not None)
        models = [vlm for vlm in (base, reward, reference) if vlm is not None]
        for vlm in models:
            check_cacheable(vlm)
        self._vocabulary = match_vocabularies(base, reward, reference=reference)
        _pack(models, pack=self.options.pack)
        self.base = base
        self.reward = reward
        self.reference = reference
        self.preparer = Preparer(base, reward, reference=reference, options=self.options)
        self.drafting = Drafting(max_drafts=self.options.max_drafts)
        self._prefixes = PrefixCache(self.options.prefix_cache_bytes)

    @overload
    def generate(self, requests: Sequence[Request]) -> list[Answer]: ...

    @overload
    def generate(
        self, requests: Sequence[Request], *, return_errors: Literal[True]
    ) -> list[Answer | TitaError]: ...

    def generate(self, requests: Sequence[Request], *, return_errors: bool = False) -> Any:
        """Answer a batch; the answers stand in the order of the requests.

        Args:
            requests: of any lengths, weights, forms and ways of sampling.
            return_errors: put the error of a request that has no answer in its place.

        Raises:
            TitaError: the first of them, once all others are answered, unless they are returned.
        """
        answers: list[Answer | TitaError] = [TitaError("no answer") for _ in requests]
        for place, answer in self.answer_each(requests, batch_size=len(requests)):
            answers[place] = answer
        if return_errors:
            return answers
        for answer in answers:
            if isinstance(answer, TitaError):
                raise answer
        return answers

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        """Answer a batch token by token.

        Yields:
            The place of a request, and its next token or the error that ended it; tokens of one
            request in order, those of several as they come. Its last has a `finish_reason`.
        """
        for place, _, outcome in self._outcomes(requests, batch_size=len(requests)):
            yield place, outcome

    def answer_each(
        self, requests: Iterable[Request], *, batch_size: int
    ) -> Iterator[tuple[int, Answer | TitaError]]:
        """Answer any number of requests, so many at a time: one comes in where another is done.

        Yields:
            The place of a request and its answer, or the error in place of one, as they are done.
        """
        written: dict[int, list[Said]] = {}
        for place, prepared, outcome in self._outcomes(requests, batch_size=batch_size):
            if prepared is None or isinstance(outcome, TitaError):
                assert isinstance(outcome, TitaError)
                written.pop(place, None)
                yield place, outcome
                continue
            written.setdefault(place, []).append(outcome)
            if outcome.finish_reason is not None:
                yield place, _answer(prepared, written.pop(place))

    def stepper(self) -> Stepper:
        """The machine that writes answers, for those who drive it themselves; without rows."""
        return Stepper(
            self.base,
            self.reward,
            reference=self.reference,
            options=self.options,
            prefixes=self._prefixes,
            drafting=self.drafting,
            vocabulary=self._vocabulary,
        )

    def _outcomes(
        self, requests: Iterable[Request], *, batch_size: int
    ) -> Iterator[tuple[int, Prepared | None, Outcome]]:
        """Each token of each request, or why it has no more."""
        stepper = self.stepper()
        waiting = enumerate(requests)
        running: dict[int, Prepared] = {}
        while True:
            fresh = list(islice(waiting, batch_size - len(stepper)))
            prepared = self._prepare([request for _, request in fresh])
            for (place, _), each in zip(fresh, prepared, strict=True):
                if isinstance(each, TitaError):
                    yield place, None, each
                elif error := _admitted(stepper, place, each):
                    yield place, each, error
                else:
                    running[place] = each
            if not len(stepper) and not fresh:
                return
            for key, outcome in stepper.step():
                place = int(str(key))
                yield place, running[place], outcome
                if is_last(outcome):
                    del running[place]

    def _prepare(self, requests: Sequence[Request]) -> list[Prepared | TitaError]:
        if self.reward is None and any(request.weight for request in requests):
            raise TitaError("guidance without a reward model", remedy="give one, or weight 0")
        return self.preparer.prepare_all(requests)


def _answer(prepared: Prepared, said: Sequence[Said]) -> Answer:
    return Answer(
        text="".join(each.text for each in said).strip(),
        token_ids=tuple(each.id for each in said if each.counted),
        finish_reason=said[-1].finish_reason or "stop",
        num_prompt_tokens=prepared.num_prompt_tokens,
        num_changed=sum(each.changed for each in said),
        tokens=tuple(map(_token, said)) if prepared.request.explain else (),
    )


def _admitted(stepper: Stepper, key: int, prepared: Prepared) -> TitaError | None:
    """Give a request a place; why it can have none."""
    try:
        stepper.admit(key, prepared)
    except TitaError as error:
        return error
    return None


def _token(said: Said) -> Token:
    assert said.base is not None
    assert said.logprob is not None
    return Token(
        id=said.id,
        text=said.token,
        base=said.base,
        reward=said.reward,
        combined=said.logprob,
        changed=said.changed,
    )


def _pack(models: Sequence[VLM], *, pack: bool | None) -> None:
    from tita.align.packing import pack_large, pack_linears

    if pack is False:
        return
    for vlm in models:
        (pack_large if pack is None else pack_linears)(vlm)
