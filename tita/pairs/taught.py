"""Pairs of a better answer: it is preferred to the base model's own, and to one without the image.

The better answer is that of contrastive decoding (`strategy=contrast`) or of another model
(`strategy=teacher`, `tita.pairs.teacher`). A contrastive form (`tita.align.forms`: `vcd`, `m3id`,
`cfg`) asks the base model a second time for every token; a reward model that learns from its
answers costs only what guidance costs. In the same way one model learns from answers that several
reward models guide (forms `tita`, `genarm`, `tita_vcd`). References of the questions are not read.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL.Image import Image

from tita.align import Engine
from tita.align.forms import Guidance
from tita.data.image_table import open_picture
from tita.pairs.build import BaseAnswers, PairBatch, PairsRun, make_pair, reject_candidate
from tita.recipes import ContrastRecipe, TaughtRecipe
from tita.records import Pair, Question
from tita.vlm.loading import VLM

PLAIN = "plain"
"""Pairs against the base model's own answer have the id `<question>/plain`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BetterAnswers:
    """One better answer per question."""

    answers: Sequence[str]
    """Empty where there is none."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of questions without one by reason; the others of them are empty answers."""
    cost: Counter[str] = field(default_factory=Counter)
    """As of a `PairBatch`."""
    served_by: frozenset[str] = frozenset()
    """As of a `PairBatch`."""


class Teacher(Protocol):
    """Gives better answers to all questions of one batch."""

    def __call__(
        self, questions: Sequence[Question], pictures: Sequence[Image], /
    ) -> BetterAnswers:
        """Answers in the order of the questions.

        Raises:
            TitaError: none could be answered.
        """
        ...


class ContrastTeacher:
    """The base model itself, with contrastive decoding."""

    def __init__(self, recipe: ContrastRecipe, *, base: BaseAnswers) -> None:
        """Raises TitaError if a value is out of range."""
        self._base = base
        self._guidance = guidance_of(recipe)

    def __call__(
        self, questions: Sequence[Question], pictures: Sequence[Image], /
    ) -> BetterAnswers:
        """Raises TitaError if a question is invalid."""
        return BetterAnswers(
            answers=self._base.answer(questions, pictures, guidance=self._guidance)
        )


def guidance_of(recipe: ContrastRecipe) -> Guidance:
    """Guidance of the preferred answer.

    Raises:
        TitaError: a value is out of range.
    """
    return Guidance.of(
        form=recipe.form,
        weight=recipe.weight,
        weights=recipe.weights,
        plausibility=recipe.plausibility,
        noise_step=recipe.noise_step if recipe.form in ("vcd", "tita_vcd") else None,
    ).among(tuple(recipe.rewards))


class TaughtPairBuilder:
    """Builds pairs from a teacher's answers and those of the base model."""

    def __init__(
        self, run: PairsRun, *, base: VLM, engine: Engine, teacher: Teacher | None = None
    ) -> None:
        """Args:
            run: questions and recipe.
            base: the base model.
            engine: of `start_base_engine`.
            teacher: gives the preferred answers; contrastive decoding if there is none.

        Raises:
            TitaError: the recipe's guidance is invalid.
        """
        self._recipe = run.recipe
        self._images = run.images
        self._base = BaseAnswers(run, base=base, engine=engine)
        self._copies: TaughtRecipe = run.recipe.teacher if teacher else run.recipe.contrast
        self._teacher = teacher or ContrastTeacher(run.recipe.contrast, base=self._base)

    def build(self, questions: Sequence[Question]) -> PairBatch:
        """Return the pairs of one batch of questions.

        Raises:
            TitaError: an image or a question is invalid, or the teacher answers nothing.
        """
        pictures = [open_picture(self._images, str(question.image)) for question in questions]
        better = self._teacher(questions, pictures)
        worse: dict[str, list[str]] = {}
        if self._copies.plain_copies:
            worse[PLAIN] = self._base.answer(questions, pictures)
        for distortion in self._recipe.distortions if self._copies.distorted_copies else ():
            worse[distortion] = self._base.answer_distorted(
                questions, pictures, distortion=distortion
            )
        pairs: list[Pair] = []
        dropped = Counter(better.dropped)
        # A question that the teacher failed on is counted once, by its reason.
        num_failed = better.dropped.total()
        for kind, answers in worse.items():
            copies = self._copies.plain_copies if kind == PLAIN else self._copies.distorted_copies
            names = [kind, *(f"{kind}-{number}" for number in range(2, copies + 1))]
            for question, chosen, rejected in zip(questions, better.answers, answers, strict=True):
                if reason := reject_candidate(question, chosen, rejected, recipe=self._recipe):
                    dropped[f"{kind}: {reason}"] += 1
                    continue
                pairs += [
                    make_pair(question, name, chosen=chosen, rejected=rejected) for name in names
                ]
            if num_failed:
                dropped[f"{kind}: empty answer"] -= num_failed
        return PairBatch(
            pairs=tuple(pairs),
            dropped=dict(+dropped),
            cost=dict(better.cost),
            served_by=tuple(sorted(better.served_by)),
        )
