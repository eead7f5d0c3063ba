"""What a run of `build-pairs` has before it, and how much of that lies finished in the store.

The questions are cut into batches, and batch b belongs to worker b mod n. A batch becomes one
object in the store once it is done, so a worker that is started again, or another number of
workers, goes on with what is missing and writes nothing twice.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tita.align import Engine, Request, Sampling
from tita.align.requests import UNGUIDED
from tita.data import open_dataset
from tita.data.normalise import normalise
from tita.errors import TitaError
from tita.pairs.distort import NoisyProcessor, distorted, seed_of
from tita.pairs.judges import Candidate, Judge, Verdict, judged, load_judge
from tita.recipes import PairsRecipe
from tita.records import Pair, Question
from tita.storage import Store, resolve
from tita.terminal import progress
from tita.vlm import VLM, Models, open_image

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What came of one batch of questions."""

    pairs: tuple[Pair, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    """Numbers of candidates that became no pair, by reason."""

    def to_json(self) -> bytes:
        pairs = [asdict(pair) for pair in self.pairs]
        return json.dumps({"pairs": pairs, "dropped": self.dropped}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Batch":
        body = json.loads(data)
        return cls(pairs=tuple(Pair(**pair) for pair in body["pairs"]), dropped=body["dropped"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that the workers of one run have before them."""

    recipe: PairsRecipe
    questions: tuple[Question, ...]
    images: Path
    out: str
    """The tree in the store that the pairs become."""
    parts: str
    """Prefix in the store of this run's finished batches."""

    @property
    def num_batches(self) -> int:
        return -(-len(self.questions) // self.recipe.batch_size)

    def key(self, batch: int) -> str:
        return f"{self.parts}/batch-{batch:06d}.json"

    def batch(self, number: int) -> Sequence[Question]:
        size = self.recipe.batch_size
        return self.questions[number * size : (number + 1) * size]

    def missing(self, store: Store) -> list[int]:
        """Batches that nobody has finished yet; one listing, however many there are."""
        there = {info.key for info in store.list(f"{self.parts}/")}
        return [number for number in range(self.num_batches) if self.key(number) not in there]

    def finished(self, store: Store) -> Iterator[Batch]:
        """The batches in their order, once none is missing."""
        return (Batch.from_json(store.get(self.key(number))) for number in range(self.num_batches))

    def sweep(self, store: Store) -> None:
        """Remove the batches: the tree holds what is in them."""
        for info in list(store.list(f"{self.parts}/")):
            store.delete(info.key)


def read_work(recipe: PairsRecipe, *, run: str, store: Store) -> Work:
    """Read the questions and look that every image is there.

    Raises:
        TitaError: no questions, an id twice, a missing image, or no reference where one is needed.
    """
    source = resolve(recipe.questions, store=store)
    folder = None if recipe.images is None else resolve(recipe.images, store=store)
    dataset = open_dataset(source, images=folder)
    questions: dict[str, Question] = {}
    for question in dataset.questions():
        if question.id in questions:
            raise TitaError(
                f"question id {question.id!r} twice", where=str(source), remedy="rename"
            )
        _check(question, images=dataset.images, recipe=recipe)
        questions[question.id] = question
        if len(questions) == recipe.max_questions:
            break
    if not questions:
        raise TitaError("no questions", where=str(source), remedy="check the recipe's questions")
    asked = tuple(questions.values())
    # Batches of another recipe, or of other questions, are not ours to go on with.
    key = hashlib.sha256(f"{recipe.model_dump_json()} {digest_of(asked)}".encode()).hexdigest()
    return Work(
        recipe=recipe,
        questions=asked,
        images=dataset.images,
        out=recipe.out or f"pairs/{run}",
        parts=f"parts/{run}/{key[:12]}",
    )


def digest_of(questions: Sequence[Question]) -> str:
    """SHA-256 of all that is asked; the images count by their names."""
    texts = json.dumps([(q.id, q.text, q.image, q.references) for q in questions])
    return hashlib.sha256(texts.encode()).hexdigest()


def _check(question: Question, *, images: Path, recipe: PairsRecipe) -> None:
    where = f"question {question.id}"
    if question.image is None or not (images / question.image).is_file():
        raise TitaError(
            f"no image {question.image!r} in {images}",
            where=where,
            remedy="check the recipe's images",
        )
    if question.references:
        return
    if recipe.chosen == "reference":
        raise TitaError("no reference answer", where=where, remedy="set chosen=clean")
    if recipe.judge == "exact-match":
        raise TitaError(
            "no reference answer for the judge to go by", where=where, remedy="leave out the judge"
        )


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
        self._engine = Engine(Models(replace(base, processor=NoisyProcessor(base.processor))))
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
                guidance=UNGUIDED,
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
