"""Selects what is trained and what is held out, and the other image of each pair.

What does not fit `max_length` is refused or dropped, with its other image too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tita.data.record_table import take
from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.records import Pair, Question
from tita.terminal import counted, say
from tita.train.measures import ImageDigests
from tita.train.negatives import Negative, NegativeKind, choose_negatives
from tita.train.training_data import TrainInputs
from tita.train.validation import check_leaks, split_by_image

_recipe_error = partial(TitaError, where="recipe of train-dpo")
_TOTAL, _IMAGE, _OTHER = range(3)
"""Columns of lengths, as of `RowLength`."""


def select(
    inputs: TrainInputs,
    *,
    pairs: Any,
    held_out: Any,
    answers: Any,
    recipe: TrainRecipe,
) -> tuple[TrainInputs, int]:
    """The inputs as they are used, and the tokens of the longest row.

    Args:
        inputs: as they were read, with the images' digests.
        pairs: lengths of the pairs, an array `[N, 3]` as in `RowMeasures`.
        held_out: of the pairs of a validation path.
        answers: of the answers of the warm-up.
        recipe: of the run.

    Raises:
        TitaError: too long, leaked between training and validation, or without another image.
    """
    rows = _Rows(pairs=inputs.pairs, lengths=pairs)
    held = _Rows(pairs=inputs.validation, lengths=held_out)
    if isinstance(recipe.validation, float):
        # Before pairs are dropped, so that the split does not depend on `max_length`.
        is_held = np.array(
            split_by_image(
                rows.pairs, share=recipe.validation, digests=inputs.image_digests, seed=recipe.seed
            )
        )
        held, rows = rows.where(is_held), rows.where(~is_held)
        inputs, answers = _hold_out_answers(inputs, held=held, answers=answers)
    if recipe.validation is not None:
        check_leaks(
            _trained_images(rows.pairs, inputs.answers),
            [pair.image for pair in held.pairs],
            digests=inputs.image_digests,
            where=f"validation={recipe.validation}",
            is_split=isinstance(recipe.validation, float),
        )
    preference = recipe.image_preference
    kind = preference.negative if preference is not None and preference.weight else None
    is_other_used = kind is not None or recipe.validation is not None
    of_image = _image_lengths((rows, held), inputs) if is_other_used else None
    rows = _fit(rows, kind=kind, of_image=of_image, inputs=inputs, recipe=recipe)
    if recipe.validation is not None:
        held = _fit(held, kind="other", of_image=of_image, inputs=inputs, recipe=recipe)
        _report(held, inputs=inputs)
    kept = find_fitting(answers[:, _TOTAL], recipe=recipe)
    totals = (rows.lengths[:, _TOTAL], held.lengths[:, _TOTAL], answers[kept, _TOTAL])
    selected = replace(
        inputs,
        pairs=rows.pairs,
        negatives=rows.others,
        validation=held.pairs,
        validation_others=held.others,
        answers=take(inputs.answers, kept),
    )
    return selected, max(int(total.max()) for total in totals if len(total))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    pairs: Sequence[Pair]
    lengths: Any
    """`[N, 3]`."""
    others: Sequence[Negative] = ()
    """The other image of each pair, if one is used."""

    def where(self, flags: Any) -> "_Rows":
        """The rows with a true flag, of `[N]`."""
        indices = np.flatnonzero(flags).astype(np.int32)
        return self.take(indices)

    def take(self, indices: Any) -> "_Rows":
        return _Rows(
            pairs=take(self.pairs, indices),
            lengths=self.lengths[indices],
            others=take(self.others, indices) if self.others else (),
        )


def _trained_images(pairs: Sequence[Pair], answers: Sequence[Question]) -> Iterator[str]:
    for pair in pairs:
        yield pair.image
        if pair.rejected_image is not None:
            yield pair.rejected_image
    for answer in answers:
        yield str(answer.image)


def _image_lengths(groups: Sequence[_Rows], inputs: TrainInputs) -> Any:
    """Tokens of the images of pairs, by their numbers."""
    digests = inputs.image_digests
    assert isinstance(digests, ImageDigests)
    found = np.zeros(len(digests), dtype=np.int32)
    for rows in groups:
        for pair, tokens in zip(rows.pairs, rows.lengths[:, _IMAGE], strict=True):
            found[digests.number(pair.image)] = tokens
    return found


def _fit(
    rows: _Rows,
    *,
    kind: NegativeKind | None,
    of_image: Any,
    inputs: TrainInputs,
    recipe: TrainRecipe,
) -> _Rows:
    """The rows that fit, with another image of the given kind for each."""
    rows = rows.take(find_fitting(rows.lengths[:, _TOTAL], recipe=recipe))
    if kind is None:
        return rows
    digests = inputs.image_digests
    assert isinstance(digests, ImageDigests)
    others = choose_negatives(rows.pairs, kind=kind, digests=digests, seed=recipe.seed)
    with_other = rows.lengths.copy()
    for length, other in zip(with_other, others, strict=True):
        is_known = kind != "rejected_image" or length[_OTHER] < 0
        added = of_image[digests.number(other.image)] if is_known else length[_OTHER]
        length[_TOTAL] += max(0, added - length[_IMAGE])
    rows = _Rows(pairs=rows.pairs, lengths=with_other, others=others)
    return rows.take(find_fitting(with_other[:, _TOTAL], recipe=recipe))


def _hold_out_answers(inputs: TrainInputs, *, held: _Rows, answers: Any) -> tuple[TrainInputs, Any]:
    """The warm-up must not learn the answers about held-out pictures either."""
    digests = inputs.image_digests
    pictures = {digests[pair.image] for pair in held.pairs}
    stays = [digests[str(question.image)] not in pictures for question in inputs.answers]
    kept = np.flatnonzero(stays).astype(np.int32)
    return replace(inputs, answers=take(inputs.answers, kept)), answers[kept]


def _report(held: _Rows, *, inputs: TrainInputs) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        pictures = {inputs.image_digests[pair.image] for pair in held.pairs}
        number = counted(len(pictures), "image")
        say(f"train-dpo: {counted(len(held.pairs), 'held-out pair')} of {number}")


def find_fitting(lengths: Any, *, recipe: TrainRecipe) -> Any:
    """The indices of the `lengths[N]` within `max_length`.

    Longer rows are an error if `too_long` is `refuse` or no row is left.
    """
    kept = np.flatnonzero(lengths <= recipe.max_length).astype(np.int32)
    num_long = len(lengths) - len(kept)
    if num_long and (recipe.too_long == "refuse" or not len(kept)):
        longest = int(lengths.max())
        raise _recipe_error(
            f"{num_long} of {len(lengths)} pairs are too long: the longest has {longest} "
            f"tokens with its image, max_length is {recipe.max_length}",
            remedy=f"--set max_length={longest}, or --set too_long=drop",
        )
    if num_long and int(os.environ.get("RANK", "0")) == 0:
        say(f"train-dpo: dropping {num_long} of {len(lengths)} pairs that exceed max_length")
    return kept
