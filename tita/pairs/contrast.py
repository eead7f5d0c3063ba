"""Pairs that contrastive decoding teaches: its answer is preferred to an answer without contrast.

A contrastive form (`tita.align.forms`: `vcd`, `m3id`, `cfg`) asks the base model a second time for
every token. A reward model that learns from its answers costs only what guidance costs. In the same
way one model learns from answers that several reward models guide (forms `tita`, `genarm`,
`tita_vcd`). References of the questions are not read.
"""

from collections import Counter
from collections.abc import Sequence

from tita.align import Engine
from tita.align.forms import Guidance
from tita.pairs.build import BaseAnswers, PairBatch, PairsRun, make_pair, reject_candidate
from tita.recipes import ContrastRecipe
from tita.records import Pair, Question
from tita.vlm.images import open_image
from tita.vlm.loading import VLM

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
        weights=recipe.weights,
        plausibility=recipe.plausibility,
        noise_step=recipe.noise_step if recipe.form in ("vcd", "tita_vcd") else None,
    ).among(tuple(recipe.rewards))


class ContrastPairBuilder:
    """Builds pairs from answers of the base model with and without contrast."""

    def __init__(self, run: PairsRun, *, base: VLM, engine: Engine) -> None:
        """Raises TitaError if the recipe's guidance is invalid."""
        self._recipe = run.recipe
        self._images = run.images
        self._guidance = guidance_of(run.recipe.contrast)
        self._base = BaseAnswers(run, base=base, engine=engine)

    def build(self, questions: Sequence[Question]) -> PairBatch:
        """Return the pairs of one batch of questions.

        Raises:
            TitaError: an image or a question is invalid.
        """
        contrast = self._recipe.contrast
        pictures = [open_image(self._images / str(question.image)) for question in questions]
        better = self._base.answer(questions, pictures, guidance=self._guidance)
        worse: dict[str, list[str]] = {}
        if contrast.plain_copies:
            worse[PLAIN] = self._base.answer(questions, pictures)
        for distortion in self._recipe.distortions if contrast.distorted_copies else ():
            worse[distortion] = self._base.answer_distorted(
                questions, pictures, distortion=distortion
            )
        pairs: list[Pair] = []
        dropped: Counter[str] = Counter()
        for kind, answers in worse.items():
            copies = contrast.plain_copies if kind == PLAIN else contrast.distorted_copies
            names = [kind, *(f"{kind}-{number}" for number in range(2, copies + 1))]
            for question, chosen, rejected in zip(questions, better, answers, strict=True):
                if reason := reject_candidate(question, chosen, rejected, recipe=self._recipe):
                    dropped[f"{kind}: {reason}"] += 1
                    continue
                pairs += [
                    make_pair(question, name, chosen=chosen, rejected=rejected) for name in names
                ]
        return PairBatch(pairs=tuple(pairs), dropped=dict(dropped))
