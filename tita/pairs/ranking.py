"""Pairs from ranked answers: of several sampled answers, the best one is preferred to the worst.

RLAIF-V (arXiv 2405.17220) and Silkie (arXiv 2312.10665) build pairs with a judge model; with the
implicit reward of a trained model in its place this is iterative DPO (arXiv 2404.19733).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL.Image import Image

from tita.align import Engine
from tita.data.image_table import image_file
from tita.pairs.build import PairBatch, PairsRun, agree, answer_questions, make_pair
from tita.records import Pair, Question
from tita.vlm.images import open_image

SUFFIX = "judge"
"""Pairs have the id `<question>/judge`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingTask:
    """Several different answers to one question."""

    question: Question
    image: Path
    picture: Image
    """The decoded image."""
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The scores of a task's answers, or why there are none."""

    scores: tuple[float, ...] = ()
    """Higher is better; the scale is the ranker's own."""
    failure: str = ""
    """In a few words; dropped questions are counted by it."""
    cost: dict[str, int] = field(default_factory=dict)
    """As of a `PairBatch`."""
    served_by: frozenset[str] = frozenset()
    """As of a `PairBatch`."""


class Ranker(Protocol):
    """Scores the answers of all tasks of one batch."""

    def __call__(self, tasks: Sequence[RankingTask], /) -> Sequence[Ranking]:
        """Return one ranking per task, in their order.

        Raises:
            TitaError: none could be ranked.
        """
        ...


class RankedPairBuilder:
    """Builds pairs by sampling answers of the base model and ranking them."""

    def __init__(self, run: PairsRun, *, engine: Engine, ranker: Ranker) -> None:
        self._recipe = run.recipe
        self._images = run.images
        self._engine = engine
        self._ranker = ranker

    def build(self, questions: Sequence[Question]) -> PairBatch:
        """Return the pairs of one batch of questions.

        Raises:
            TitaError: an image or a question is invalid, or nothing could be ranked.
        """
        paths = [image_file(self._images, str(question.image)) for question in questions]
        pictures = [open_image(path) for path in paths]
        samples = [
            answer_questions(
                self._engine, questions, pictures, recipe=self._recipe, purpose=f"sample {number}"
            )
            for number in range(self._recipe.samples)
        ]
        tasks: list[RankingTask] = []
        dropped: Counter[str] = Counter()
        for question, path, picture, answers in zip(
            questions, paths, pictures, zip(*samples, strict=True), strict=True
        ):
            different = self._different(answers)
            if len(different) < 2:
                dropped["answers agree" if different else "empty answer"] += 1
                continue
            tasks.append(
                RankingTask(question=question, image=path, picture=picture, answers=different)
            )
        pairs: list[Pair] = []
        cost: Counter[str] = Counter()
        served_by: set[str] = set()
        for task, ranking in zip(tasks, self._ranker(tasks) if tasks else (), strict=True):
            cost.update(ranking.cost)
            served_by |= ranking.served_by
            pair = best_against_worst(task, ranking)
            if isinstance(pair, Pair):
                pairs.append(pair)
            else:
                dropped[f"judge: {pair}"] += 1
        return PairBatch(
            pairs=tuple(pairs),
            dropped=dict(dropped),
            cost=dict(cost),
            served_by=tuple(sorted(served_by)),
        )

    def _different(self, answers: Sequence[str]) -> tuple[str, ...]:
        """Answers that are not empty, without those that agree with an earlier one."""
        exact = self._recipe.agreement == "exact"
        found: list[str] = []
        for answer in filter(str.strip, answers):
            if not any(agree(answer, other, exact=exact) for other in found):
                found.append(answer)
        return tuple(found)


def best_against_worst(task: RankingTask, ranking: Ranking) -> Pair | str:
    """The first of the best answers as chosen, and the first of the worst as rejected.

    Or why there is no pair, in a few words.
    """
    scores = ranking.scores
    if ranking.failure:
        return ranking.failure
    if not all(map(math.isfinite, scores)):
        return "a score is not finite"
    if max(scores) == min(scores):
        return "tie"
    chosen, rejected = (
        task.answers[scores.index(extreme)] for extreme in (max(scores), min(scores))
    )
    return make_pair(task.question, SUFFIX, chosen=chosen, rejected=rejected)
