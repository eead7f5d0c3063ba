"""Builds preference pairs in batches, from the base model's answers to clean and distorted images.

Worker `b mod n` of n builds batch b and writes it to the store as one object. A restarted run, with
any number of workers, continues with the missing batches and those whose models or images have
changed since. In a run on many questions a batch is built in several steps of the recipe's
`batch_size`, so that there are at most a few thousand objects.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from PIL.Image import Image

from tita.align import Engine, Request, Sampling
from tita.align.forms import UNGUIDED, Guidance
from tita.data.digest_set import DigestSet
from tita.data.image_table import Images, ImageTable, image_file, image_sha256, open_picture
from tita.data.normalise import comparable
from tita.data.record_table import open_records
from tita.errors import TitaError
from tita.pairs.distort import derive_seed, distort
from tita.pairs.judges import Candidate, Preference, apply_judge, load_judge
from tita.recipes import PairsRecipe
from tita.records import ContextTurn, Pair, Question
from tita.storage import Store, resolve
from tita.terminal import progress, say
from tita.vlm.loading import VLM
from tita.vlm.prompts import to_turns

_BATCHES_OF_ONE_STEP = 512
"""A run with at most twice as many batches builds each in one step."""
_MAX_STEPS_PER_BATCH = 16
"""Bounds what a killed worker repeats."""
_READERS = 16
"""Concurrent requests to read the batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """The pairs of one batch of questions."""

    pairs: tuple[Pair, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped candidates by reason."""
    cost: dict[str, int] = field(default_factory=dict)
    """Requests to a judge's endpoint, and tokens in and out."""
    inputs_sha256: str = ""
    """Digest of the models and images that it was built with (`PairsRun.inputs_digest`)."""
    endpoint: Mapping[str, Any] = field(default_factory=dict)
    """What the endpoint of judge or teacher told of its model; empty if it told nothing."""
    served_by: tuple[str, ...] = ()
    """Models as replies of the endpoint name them, with fingerprints."""

    @classmethod
    def join(cls, batches: Iterable[Self]) -> Self:
        """One batch of several."""
        pairs: list[Pair] = []
        dropped: Counter[str] = Counter()
        cost: Counter[str] = Counter()
        served_by: set[str] = set()
        for batch in batches:
            pairs += batch.pairs
            dropped.update(batch.dropped)
            cost.update(batch.cost)
            served_by.update(batch.served_by)
        return cls(
            pairs=tuple(pairs),
            dropped=dict(dropped),
            cost=dict(cost),
            served_by=tuple(sorted(served_by)),
        )

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        body = json.loads(data)
        pairs = (
            Pair(**{**pair, "context": tuple(ContextTurn(**turn) for turn in pair["context"])})
            for pair in body["pairs"]
        )
        return cls(
            pairs=tuple(pairs),
            dropped=body["dropped"],
            cost=body["cost"],
            inputs_sha256=body.get("inputs_sha256", ""),
            endpoint=body.get("endpoint", {}),
            served_by=tuple(body.get("served_by", ())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsRun:
    """The questions of one run and its objects in the store."""

    recipe: PairsRecipe
    questions: Sequence[Question]
    images: Images
    out: str
    """The tree that the pairs are written to."""
    parts: str
    """Prefix of the finished batches."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Digests of the models by role (`digest_models`)."""
    endpoint: Mapping[str, Any] = field(default_factory=dict)
    """What the endpoint tells of its model now, as of a `PairBatch`."""

    @property
    def steps_per_batch(self) -> int:
        """The most steps in which a batch is built; the same for any number of workers."""
        steps = len(self.questions) // (self.recipe.batch_size * _BATCHES_OF_ONE_STEP)
        return min(max(steps, 1), _MAX_STEPS_PER_BATCH)

    @property
    def _questions_per_batch(self) -> int:
        return self.recipe.batch_size * self.steps_per_batch

    @property
    def num_batches(self) -> int:
        return -(-len(self.questions) // self._questions_per_batch)

    def steps(self, number: int) -> Iterator[Sequence[Question]]:
        """The questions of a batch, at most `batch_size` at a time."""
        size, step = self._questions_per_batch, self.recipe.batch_size
        questions = list(self.questions[number * size : (number + 1) * size])
        return (questions[start : start + step] for start in range(0, len(questions), step))

    def batch_key(self, number: int) -> str:
        return f"{self.parts}/batch-{number:06d}.json"

    def missing_batches(self, store: Store, *, among: Sequence[int] | None = None) -> list[int]:
        """The numbers of the unfinished batches, from one listing of the store.

        Args:
            among: batches that were unfinished before, in order; the listing starts at the first.
        """
        numbers = range(self.num_batches) if among is None else among
        if not numbers:
            return []
        listing = store.list(f"{self.parts}/", start_at=self.batch_key(numbers[0]))
        keys = {info.key for info in listing}
        return [n for n in numbers if self.batch_key(n) not in keys]

    def image_digests(self, number: int) -> dict[str, str]:
        """SHA-256 of the images of a batch by name, in the order of its questions."""
        names = dict.fromkeys(str(each.image) for step in self.steps(number) for each in step)
        return {name: image_sha256(self.images, name) for name in names}

    def is_outdated(self, batch: PairBatch, image_digests: Mapping[str, str]) -> bool:
        """Whether a batch was built with other models, or with images of other digests."""
        if batch.endpoint and self.endpoint and batch.endpoint != self.endpoint:
            return True
        # Batches of older versions have no digest.
        return batch.inputs_sha256 not in ("", self.inputs_digest(image_digests))

    def inputs_digest(self, image_digests: Mapping[str, str]) -> str:
        """Digest of the models and of the images of one batch."""
        facts = json.dumps([sorted(self.models.items()), *image_digests.values()])
        return hashlib.sha256(facts.encode()).hexdigest()

    def outdated_batches(self, store: Store, numbers: Sequence[int]) -> list[int]:
        """Those of the finished batches that were built with other models or images."""

        def is_outdated(number: int) -> bool:
            batch = PairBatch.from_json(store.get(self.batch_key(number)))
            return self.is_outdated(batch, self.image_digests(number))

        found: list[int] = []
        with (
            progress("checking the batches", total=len(numbers), unit="batches") as advance,
            ThreadPoolExecutor(_READERS) as pool,
        ):
            for some in (numbers[n : n + _READERS] for n in range(0, len(numbers), _READERS)):
                found += itertools.compress(some, pool.map(is_outdated, some))
                advance(len(some))
        return found

    def read_batches(self, store: Store) -> Iterator[PairBatch]:
        """Yield all batches in order; none may be missing."""
        keys = map(self.batch_key, range(self.num_batches))
        with ThreadPoolExecutor(_READERS) as pool:
            for some in iter(lambda: list(itertools.islice(keys, 4 * _READERS)), []):
                yield from map(PairBatch.from_json, pool.map(store.get, some))

    def check_questions(self, store: Store) -> None:
        """Check that the tree that is there was built from the questions as they are now.

        Raises:
            TitaError: it was built from others.
        """
        manifest = store.read_manifest(self.out)
        built_from = None if manifest is None else manifest.meta.get("questions_sha256")
        if built_from not in (None, hash_questions(self.questions)):
            raise TitaError(
                f"this tree was built from other questions than {self.recipe.questions} has now",
                where=self.out,
                remedy="choose another run name",
            )

    def delete_batches(self, store: Store) -> None:
        """Delete the batches once the tree is written."""
        store.delete_tree(self.parts)


def prepare_run(recipe: PairsRecipe, *, name: str, store: Store) -> PairsRun:
    """Read the questions and check that all images exist.

    Raises:
        TitaError: there are no questions, an id is used twice, an image is missing, or a reference
            answer that the recipe needs.
    """
    source = resolve(recipe.questions, store=store)
    folder = None if recipe.images is None else resolve(recipe.images, store=store)
    asked = open_records(
        source, Question, images=folder, ignore=recipe.ignore_columns, limit=recipe.max_questions
    )
    ids = DigestSet()
    for question in asked:
        if not ids.add(question.id):
            raise TitaError(
                f"question id {question.id!r} is used twice",
                where=str(source),
                remedy="give each question its own id",
            )
        _check_question(question, images=asked.images, recipe=recipe)
    if not asked:
        raise TitaError("no questions", where=str(source), remedy="check the recipe's questions")
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{source.name}: {asked.facts.layouts}")
    # Never continue with batches of another recipe or of other questions.
    facts = f"{json.dumps(recipe.identity())} {hash_questions(asked)}"
    key = hashlib.sha256(facts.encode()).hexdigest()
    return PairsRun(
        recipe=recipe,
        questions=asked,
        images=asked.source(),
        out=recipe.out or f"pairs/{name}",
        parts=f"parts/{name}/{key[:12]}",
    )


def hash_questions(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of questions, their contexts, references and image paths."""
    digest = hashlib.sha256()
    for q in questions:
        text = json.dumps((q.id, q.text, q.image, q.references, *map(asdict, q.context)))
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def _check_question(question: Question, *, images: ImageTable, recipe: PairsRecipe) -> None:
    where = f"question {question.id}"
    if question.image is None or question.image == images.missing:
        raise TitaError(
            f"no image {question.image!r} in {images.folder}",
            where=where,
            remedy="check the recipe's images",
        )
    if question.references:
        return
    if recipe.chosen == "reference":
        raise TitaError("no reference answer", where=where, remedy="set chosen=clean")
    if recipe.judge == "exact-match":
        raise TitaError(
            "no reference answer for the judge `exact-match`",
            where=where,
            remedy="add one, or remove the judge",
        )


class BaseAnswers:
    """Answers of the base model to questions about images, distorted or as they are.

    Equal seeds for all answers to a question, so that only the image or the guidance makes a
    difference.
    """

    def __init__(self, run: PairsRun, *, base: VLM, engine: Engine) -> None:
        """The engine is of `start_base_engine`."""
        self._recipe = run.recipe
        self._pad = base.image_aspect == "pad"
        self._engine = engine

    def answer(
        self,
        questions: Sequence[Question],
        images: Sequence[Image],
        *,
        guidance: Guidance = UNGUIDED,
    ) -> list[str]:
        """One answer per question; errors as of `answer_questions`."""
        return answer_questions(
            self._engine,
            questions,
            images,
            recipe=self._recipe,
            purpose="answer",
            guidance=guidance,
        )

    def answer_distorted(
        self, questions: Sequence[Question], images: Sequence[Image], *, distortion: str
    ) -> list[str]:
        """One answer per question, about the distorted image."""
        distorted = [
            distort(
                image,
                question_id=question.id,
                distortion=distortion,
                recipe=self._recipe,
                pad=self._pad,
            )
            for question, image in zip(questions, images, strict=True)
        ]
        return self.answer(questions, distorted)


class PairBuilder:
    """Builds pairs by asking the base model."""

    def __init__(self, run: PairsRun, *, base: VLM, engine: Engine) -> None:
        """Raises TitaError if the recipe's judge cannot be loaded."""
        self._recipe = run.recipe
        self._images = run.images
        self._base = BaseAnswers(run, base=base, engine=engine)
        judge = run.recipe.judge
        self._judge = None if judge is None else load_judge(judge)

    def build(self, questions: Sequence[Question]) -> PairBatch:
        """Return the pairs of one batch of questions.

        Raises:
            TitaError: an image or a question is invalid, or the judge returns invalid results.
        """
        clean = [open_picture(self._images, str(question.image)) for question in questions]
        chosen = (
            [question.references[0] for question in questions]
            if self._recipe.chosen == "reference"
            else self._base.answer(questions, clean)
        )
        kinds: list[str] = []
        candidates: list[Candidate] = []
        dropped: Counter[str] = Counter()
        for distortion in self._recipe.distortions:
            rejected = self._base.answer_distorted(questions, clean, distortion=distortion)
            for question, good, bad in zip(questions, chosen, rejected, strict=True):
                reason = reject_candidate(question, good, bad, recipe=self._recipe)
                if reason:
                    dropped[reason] += 1
                    continue
                kinds.append(distortion)
                candidates.append(
                    Candidate(
                        question=question, image=self._file(question), chosen=good, rejected=bad
                    )
                )
        preferences: Sequence[Preference] = (
            [Preference(better="chosen")] * len(candidates)
            if self._judge is None
            else apply_judge(self._judge, candidates, name=str(self._recipe.judge))
        )
        pairs = []
        for kind, candidate, preference in zip(kinds, candidates, preferences, strict=True):
            if preference.better == "neither":
                dropped[f"judge: {preference.reason or 'neither is better'}"] += 1
                continue
            answers = (candidate.chosen, candidate.rejected)
            better, worse = answers if preference.better == "chosen" else answers[::-1]
            pairs.append(make_pair(candidate.question, kind, chosen=better, rejected=worse))
        return PairBatch(pairs=tuple(pairs), dropped=dict(dropped))

    def _file(self, question: Question) -> Path:
        """The image's file for the judge; no file is written where none is asked."""
        name = str(question.image)
        return Path(name) if self._judge is None else image_file(self._images, name)


def make_pair(question: Question, kind: str, *, chosen: str, rejected: str) -> Pair:
    """A pair of two answers to a question; its id is `<question>/<kind>`."""
    return Pair(
        id=f"{question.id}/{kind}",
        image=str(question.image),
        question=question.text,
        chosen=chosen,
        rejected=rejected,
        context=question.context,
    )


def answer_questions(
    engine: Engine,
    questions: Sequence[Question],
    images: Sequence[Image],
    *,
    recipe: PairsRecipe,
    purpose: str,
    guidance: Guidance = UNGUIDED,
) -> list[str]:
    """The base model's answers, one per question.

    Args:
        guidance: a form without a reward model, or none.
        purpose: answers of different purposes have different random numbers.

    Raises:
        TitaError: a question is invalid.
    """
    requests = [
        Request(
            turns=to_turns(question.context, question.text, (image,)),
            guidance=guidance,
            sampling=Sampling(
                max_new_tokens=recipe.max_new_tokens,
                temperature=recipe.temperature,
                top_p=recipe.top_p,
                seed=derive_seed(question.id, purpose=purpose, seed=recipe.seed),
            ),
        )
        for question, image in zip(questions, images, strict=True)
    ]
    answers = []
    outcomes = engine.generate(requests, return_errors=True)
    for question, outcome in zip(questions, outcomes, strict=True):
        if isinstance(outcome, TitaError):
            raise TitaError(
                outcome.what, where=f"question {question.id}", remedy=outcome.remedy
            ) from outcome
        answers.append(outcome.text)
    return answers


def reject_candidate(
    question: Question, chosen: str, rejected: str, *, recipe: PairsRecipe
) -> str | None:
    """Why two answers make no pair; None if they do."""
    if not chosen.strip() or not rejected.strip():
        return "empty answer"
    # With several references, an answer that equals any of them is correct.
    correct = question.references if recipe.chosen == "reference" else (chosen,)
    if any(agree(answer, rejected, exact=recipe.agreement == "exact") for answer in correct):
        return "answers agree"
    return None


def agree(answer: str, other: str, *, exact: bool) -> bool:
    """Whether two answers are equal, for the recipe's `agreement`."""
    if exact:
        return answer.split() == other.split()
    return comparable(answer) == comparable(other)
