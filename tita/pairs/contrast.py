"""Pairs that contrastive decoding teaches: its answer is preferred to an answer without contrast.

A contrastive form (`tita.align.forms`: `vcd`, `m3id`, `cfg`) asks the base model a second time for
every token. A reward model that learns from its answers costs only what guidance costs. References
of the questions are not read.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tita.align import Engine
from tita.align.forms import Guidance
from tita.pairs.build import PairBatch, PairsRun, agree, answer_questions
from tita.pairs.distort import NoisyProcessor, distort
from tita.recipes import ContrastRecipe
from tita.records import Pair, Question
from tita.vlm.images import open_image
from tita.vlm.loading import VLM, Models

PLAIN = "plain"
"""Pairs against the answer without contrast have the id `<question>/plain`."""


def guidance_of(recipe: ContrastRecipe) -> Guidance:
    """Guidance of the preferred answer.

    Raises:
        TitaError: a value is out of range.
    """
    return Guidance.of(
        form=recipe.form,
        weight=recipe.weight,
        plausibility=recipe.plausibility,
        noise_step=recipe.noise_step if recipe.form == "vcd" else None,
    )


class ContrastPairBuilder:
    """Builds pairs from answers of the base model with and without contrast."""

    def __init__(self, run: PairsRun, *, base: VLM) -> None:
        """Raises TitaError if the recipe's guidance is invalid."""
        self._recipe = run.recipe
        self._images = run.images
        self._pad = base.image_aspect == "pad"
        self._guidance = guidance_of(run.recipe.contrast)
        self._engine = Engine(Models(replace(base, processor=NoisyProcessor(base.processor))))

    def build(self, questions: Sequence[Question]) -> PairBatch:
        """Return the pairs of one batch of questions.

        Raises:
            TitaError: an image or a question is invalid.
        """
        recipe = self._recipe
        pictures = [open_image(self._images / str(question.image)) for question in questions]
        # Equal seeds for all answers, so that only the contrast or the image makes a difference.
        better = answer_questions(
            self._engine, questions, pictures, recipe=recipe, purpose="answer",
            guidance=self._guidance,
        )  # fmt: skip
        worse: dict[str, list[str]] = {}
        copies = {PLAIN: recipe.contrast.plain_copies}
        if recipe.contrast.plain_copies:
            worse[PLAIN] = answer_questions(
                self._engine, questions, pictures, recipe=recipe, purpose="answer"
            )
        for distortion in recipe.distortions if recipe.contrast.distorted_copies else ():
            distorted = [
                distort(
                    picture, question_id=question.id, distortion=distortion, recipe=recipe,
                    pad=self._pad,
                )
                for question, picture in zip(questions, pictures, strict=True)
            ]  # fmt: skip
            copies[distortion] = recipe.contrast.distorted_copies
            worse[distortion] = answer_questions(
                self._engine, questions, distorted, recipe=recipe, purpose="answer"
            )
        pairs: list[Pair] = []
        dropped: Counter[str] = Counter()
        for kind, answers in worse.items():
            for question, chosen, rejected in zip(questions, better, answers, strict=True):
                reason = self._reject(chosen, rejected)
                if reason:
                    dropped[f"{kind}: {reason}"] += 1
                    continue
                pairs += [
                    Pair(
                        id=f"{question.id}/{kind}" + (f"-{copy + 1}" if copy else ""),
                        image=str(question.image),
                        question=question.text,
                        chosen=chosen,
                        rejected=rejected,
                        context=question.context,
                    )
                    for copy in range(copies[kind])
                ]
        return PairBatch(pairs=tuple(pairs), dropped=dict(dropped))

    def _reject(self, chosen: str, rejected: str) -> str | None:
        """Why two answers make no pair; None if they do."""
        if not chosen.strip() or not rejected.strip():
            return "empty answer"
        same = agree(chosen, rejected, exact=self._recipe.agreement == "exact")
        return "answers agree" if same else None
