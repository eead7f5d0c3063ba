"""One worker's share of the pairs: answers to clean and distorted images, batch by batch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tita.align import Engine, Request, Sampling
from tita.data.normalise import normalise
from tita.errors import TitaError
from tita.pairs.distort import distorted, seed_of
from tita.pairs.judges import Candidate, Judge, Verdict, judged, load_judge
from tita.pairs.noise import NoisyProcessor
from tita.pairs.work import Batch, Work
from tita.recipes import PairsRecipe
from tita.records import Pair, Question
from tita.storage import Store
from tita.terminal import progress
from tita.vlm import VLM, open_image

if TYPE_CHECKING:
    from PIL.Image import Image


def build_share(work: Work, numbers: Sequence[int], *, base: VLM, store: Store, rank: int) -> None:
    """Build these batches, and put each into the store once it is done."""
    builder = Builder(work, base=base)
    with progress(f"pairs, worker {rank}", total=len(numbers), unit="batches") as advance:
        for number in numbers:
            store.put(work.key(number), builder.build(work.batch(number)).to_json())
            advance()


class Builder:
    """Makes pairs of questions by asking the base model."""

    def __init__(self, work: Work, *, base: VLM) -> None:
        """Raises TitaError if there is no such judge as the recipe names."""
        self._recipe = work.recipe
        self._images = work.images
        self._pad = base.image_aspect == "pad"
        self._engine = Engine(replace(base, processor=NoisyProcessor(base.processor)))
        self._judge: Judge | None = (
            None if self._recipe.judge is None else load_judge(self._recipe.judge)
        )

    def build(self, questions: Sequence[Question]) -> Batch:
        """Pairs of one batch of questions.

        Raises:
            TitaError: an image cannot be read, a question cannot be asked, the judge misbehaves.
        """
        clean = [open_image(self._images / str(question.image)) for question in questions]
        chosen = (
            [question.references[0] for question in questions]
            if self._recipe.chosen == "reference"
            else self._answers(questions, clean)
        )
        candidates: list[tuple[str, Candidate]] = []
        dropped: Counter[str] = Counter()
        for name in self._recipe.distortions:
            seen = [
                distorted(
                    image, question=question.id, distortion=name, recipe=self._recipe, pad=self._pad
                )
                for question, image in zip(questions, clean, strict=True)
            ]
            rejected = self._answers(questions, seen)
            for question, good, bad in zip(questions, chosen, rejected, strict=True):
                reason = _fault(question, good, bad, recipe=self._recipe)
                if reason:
                    dropped[reason] += 1
                    continue
                image = self._images / str(question.image)
                candidate = Candidate(question=question, image=image, chosen=good, rejected=bad)
                candidates.append((f"{question.id}/{name}", candidate))
        pairs = tuple(self._kept(candidates, dropped=dropped))
        return Batch(pairs=pairs, dropped=dict(dropped))

    def _kept(
        self, candidates: Sequence[tuple[str, Candidate]], *, dropped: Counter[str]
    ) -> Iterable[Pair]:
        """Pairs of the candidates that the judge lets pass; others are counted in `dropped`."""
        alone = [candidate for _, candidate in candidates]
        verdicts: Sequence[Verdict] = (
            [Verdict(better="chosen")] * len(alone)
            if self._judge is None
            else judged(self._judge, alone, name=str(self._recipe.judge))
        )
        for (identifier, candidate), verdict in zip(candidates, verdicts, strict=True):
            if verdict.better == "neither":
                dropped[f"judge: {verdict.reason or 'neither is better'}"] += 1
                continue
            answers = (candidate.chosen, candidate.rejected)
            chosen, rejected = answers if verdict.better == "chosen" else answers[::-1]
            yield Pair(
                id=identifier,
                image=str(candidate.question.image),
                question=candidate.question.text,
                chosen=chosen,
                rejected=rejected,
            )

    def _answers(self, questions: Sequence[Question], images: "Sequence[Image]") -> list[str]:
        requests = [
            Request(
                question=question.text,
                images=(image,),
                weight=0.0,
                sampling=Sampling(
                    max_new_tokens=self._recipe.max_new_tokens,
                    temperature=self._recipe.temperature,
                    top_p=self._recipe.top_p,
                    # The same for both answers: what differs comes of the image, not of chance.
                    seed=seed_of(question.id, distortion="answer", seed=self._recipe.seed),
                ),
            )
            for question, image in zip(questions, images, strict=True)
        ]
        answers = []
        outcomes = self._engine.generate(requests, return_errors=True)
        for question, outcome in zip(questions, outcomes, strict=True):
            if isinstance(outcome, TitaError):
                raise TitaError(
                    str(outcome.what), where=f"question {question.id}", remedy=outcome.remedy
                ) from outcome
            answers.append(outcome.text)
        return answers


def _fault(question: Question, chosen: str, rejected: str, *, recipe: PairsRecipe) -> str | None:
    """Why two answers make no pair; None if they do."""
    if not chosen.strip() or not rejected.strip():
        return "empty answer"
    # Any of several reference answers is as right as the one that is chosen.
    right = question.references if recipe.chosen == "reference" else (chosen,)
    if any(_agree(one, rejected, exactly=recipe.agreement == "exact") for one in right):
        return "answers agree"
    return None


def _agree(one: str, other: str, *, exactly: bool) -> bool:
    if exactly:
        return one.split() == other.split()
    # An answer may be nothing but an article: the letter of a choice.
    left, right = (normalise(text) or text.strip().casefold() for text in (one, other))
    return left == right
