"""One worker's share of the pairs: answers to clean and distorted images, batch by batch.

The questions are cut into batches, and batch b belongs to worker b mod n. A batch becomes one
object in the store once it is done, so a worker that is started again, or another number of
workers, goes on with what is missing and writes nothing twice.
"""

import json
import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tita.align import Engine, Request, Sampling
from tita.data import open_dataset
from tita.errors import TitaError
from tita.pairs.distort import DISTORTIONS, seed_of
from tita.recipes import PairsRecipe
from tita.records import Pair, Question
from tita.storage import Store, resolve
from tita.terminal import progress
from tita.vlm import VLM, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


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


def read_work(recipe: PairsRecipe, *, run: str, store: Store) -> Work:
    """Read the questions and look that every image is there.

    Raises:
        TitaError: no questions, an id twice, a missing image, or no reference where one is needed.
    """
    source = resolve(recipe.questions, store=store)
    folder = None if recipe.images is None else resolve(recipe.images, store=store)
    dataset = open_dataset(source, images=folder)
    images = dataset.images
    questions: dict[str, Question] = {}
    for question in dataset.questions():
        if question.id in questions:
            raise TitaError(
                f"question id {question.id!r} twice", where=str(source), remedy="rename"
            )
        if question.image is None or not (images / question.image).is_file():
            raise TitaError(
                f"no image {question.image!r} in {images}",
                where=f"question {question.id}",
                remedy="check the recipe's images",
            )
        if recipe.chosen == "reference" and not question.references:
            raise TitaError(
                "no reference answer", where=f"question {question.id}", remedy="set chosen=clean"
            )
        questions[question.id] = question
        if len(questions) == recipe.max_questions:
            break
    if not questions:
        raise TitaError("no questions", where=str(source), remedy="check the recipe's questions")
    # Batches of another recipe are not ours to go on with.
    key = zlib.crc32(recipe.model_dump_json().encode())
    return Work(
        recipe=recipe,
        questions=tuple(questions.values()),
        images=images,
        parts=f"parts/{run}-{key:08x}",
    )


def build_share(work: Work, *, base: VLM, store: Store, rank: int, world_size: int) -> None:
    """Answer the batches that belong to this worker and are not done yet."""
    engine = Engine(base)
    mine = range(rank, work.num_batches, world_size)
    with progress(f"pairs, worker {rank}", total=len(mine), unit="batches") as advance:
        for number in mine:
            if not store.exists(work.key(number)):
                batch = build_batch(work, work.batch(number), engine=engine)
                store.put(work.key(number), batch.to_json())
            advance()


def build_batch(work: Work, questions: Sequence[Question], *, engine: Engine) -> Batch:
    """Pairs of one batch of questions."""
    recipe = work.recipe
    clean = [open_image(work.images / str(question.image)) for question in questions]
    if recipe.chosen == "reference":
        chosen = [question.references[0] for question in questions]
    else:
        chosen = _answers(engine, questions, clean, recipe=recipe)
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for name in recipe.distortions:
        distorted = [
            DISTORTIONS[name](
                image,
                step=recipe.diffusion_steps,
                seed=seed_of(question.id, distortion=name, seed=recipe.seed),
            )
            for question, image in zip(questions, clean, strict=True)
        ]
        rejected = _answers(engine, questions, distorted, recipe=recipe)
        for question, good, bad in zip(questions, chosen, rejected, strict=True):
            reason = _fault(good, bad)
            if reason:
                dropped[reason] += 1
                continue
            pairs.append(
                Pair(
                    id=f"{question.id}/{name}",
                    image=str(question.image),
                    question=question.text,
                    chosen=good,
                    rejected=bad,
                )
            )
    return Batch(pairs=tuple(pairs), dropped=dict(dropped))


def _fault(chosen: str, rejected: str) -> str | None:
    if not chosen or not rejected:
        return "empty answer"
    if chosen.strip().lower() == rejected.strip().lower():
        return "answers agree"
    return None


def _answers(
    engine: Engine, questions: Sequence[Question], images: "Sequence[Image]", *, recipe: PairsRecipe
) -> list[str]:
    requests = [
        Request(
            question=question.text,
            images=(image,),
            weight=0.0,
            sampling=Sampling(
                max_new_tokens=recipe.max_new_tokens,
                temperature=recipe.temperature,
                seed=seed_of(question.id, distortion="answer", seed=recipe.seed),
            ),
        )
        for question, image in zip(questions, images, strict=True)
    ]
    return [answer.text for answer in engine.generate(requests)]
