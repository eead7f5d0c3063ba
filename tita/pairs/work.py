"""What a run of `build-pairs` has before it, and how much of that lies finished in the store.

The questions are cut into batches, and batch b belongs to worker b mod n. A batch becomes one
object in the store once it is done, so a worker that is started again, or another number of
workers, goes on with what is missing and writes nothing twice.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tita.data import open_dataset
from tita.errors import TitaError
from tita.recipes import PairsRecipe
from tita.records import Pair, Question
from tita.storage import Store, resolve


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
