"""Selects what is trained and what is held out, and the other image of each pair.

What does not fit `max_length` is refused or dropped, with its other image too.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.records import Pair
from tita.terminal import counted, say
from tita.train.negatives import Negative, NegativeKind, choose_negatives
from tita.train.training_data import RowLength, TrainInputs
from tita.train.validation import check_leaks, split_by_image

T = TypeVar("T")
_recipe_error = partial(TitaError, where="recipe of train-dpo")


def select(
    inputs: TrainInputs,
    *,
    pairs: Sequence[RowLength],
    held_out: Sequence[RowLength],
    answers: Sequence[RowLength],
    recipe: TrainRecipe,
) -> tuple[TrainInputs, int]:
    """The inputs as they are used, and the tokens of the longest row.

    Args:
        inputs: as they were read, with the images' digests.
        pairs: length of each pair.
        held_out: length of each pair of a validation path.
        answers: length of each answer of the warm-up.
        recipe: of the run.

    Raises:
        TitaError: too long, leaked between training and validation, or without another image.
    """
    rows = _Rows.of(inputs.pairs, pairs)
    held = _Rows.of(inputs.validation, held_out)
    if isinstance(recipe.validation, float):
        # Before pairs are dropped, so that the split does not depend on `max_length`.
        flags = split_by_image(
            rows.pairs, share=recipe.validation, digests=inputs.image_digests, seed=recipe.seed
        )
        held = rows.where(flags)
        rows = rows.where([not flag for flag in flags])
        inputs, answers = _hold_out_answers(inputs, held=held, answers=answers)
    if recipe.validation is not None:
        names = {pair.image for pair in rows.pairs} | {str(q.image) for q in inputs.answers}
        names |= {p.rejected_image for p in rows.pairs if p.rejected_image is not None}
        check_leaks(
            sorted(names),
            [pair.image for pair in held.pairs],
            digests=inputs.image_digests,
            where=f"validation={recipe.validation}",
        )
    lengths_of_images = {
        pair.image: length.image
        for some in (rows, held)
        for pair, length in zip(some.pairs, some.lengths, strict=True)
    }
    preference = recipe.image_preference
    kind = preference.negative if preference is not None and preference.weight else None
    rows = _fit(rows, kind=kind, of_image=lengths_of_images, inputs=inputs, recipe=recipe)
    if recipe.validation is not None:
        held = _fit(held, kind="other", of_image=lengths_of_images, inputs=inputs, recipe=recipe)
        _report(held, inputs=inputs)
    kept_answers, of_answers = keep_fitting(inputs.answers, lengths=answers, recipe=recipe)
    used = [*rows.lengths, *held.lengths, *of_answers]
    selected = replace(
        inputs,
        pairs=rows.pairs,
        negatives=rows.others,
        validation=held.pairs,
        validation_others=held.others,
        answers=kept_answers,
    )
    return selected, max(length.total for length in used)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    pairs: tuple[Pair, ...]
    lengths: tuple[RowLength, ...]
    others: tuple[Negative, ...] = ()
    """The other image of each pair, if one is used."""

    @classmethod
    def of(cls, pairs: Sequence[Pair], lengths: Sequence[RowLength]) -> "_Rows":
        return cls(pairs=tuple(pairs), lengths=tuple(lengths))

    def where(self, flags: Sequence[bool]) -> "_Rows":
        rows = zip(self.pairs, self.lengths, flags, strict=True)
        kept = [(pair, length) for pair, length, flag in rows if flag]
        return _Rows.of([pair for pair, _ in kept], [length for _, length in kept])


def _fit(
    rows: _Rows,
    *,
    kind: NegativeKind | None,
    of_image: dict[str, int],
    inputs: TrainInputs,
    recipe: TrainRecipe,
) -> _Rows:
    """The rows that fit, with another image of the given kind for each."""
    pairs, lengths = keep_fitting(rows.pairs, lengths=rows.lengths, recipe=recipe)
    if kind is None:
        return _Rows.of(pairs, lengths)
    others = choose_negatives(pairs, kind=kind, digests=inputs.image_digests, seed=recipe.seed)
    with_other = []
    for length, other in zip(lengths, others, strict=True):
        known = kind != "rejected_image" or length.other_image is None
        added = of_image[other.image] if known else length.other_image
        assert added is not None
        total = length.total + max(0, added - length.image)
        with_other.append(replace(length, total=total))
    together, kept = keep_fitting(
        tuple(zip(pairs, others, strict=True)), lengths=with_other, recipe=recipe
    )
    return _Rows(
        pairs=tuple(pair for pair, _ in together),
        lengths=kept,
        others=tuple(other for _, other in together),
    )


def _hold_out_answers(
    inputs: TrainInputs, *, held: _Rows, answers: Sequence[RowLength]
) -> tuple[TrainInputs, Sequence[RowLength]]:
    """The warm-up must not learn the answers about held-out pictures either."""
    digests = inputs.image_digests
    pictures = {digests[pair.image] for pair in held.pairs}
    kept = [
        (question, length)
        for question, length in zip(inputs.answers, answers, strict=True)
        if digests[str(question.image)] not in pictures
    ]
    found = replace(inputs, answers=tuple(question for question, _ in kept))
    return found, [length for _, length in kept]


def _report(held: _Rows, *, inputs: TrainInputs) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        pictures = {inputs.image_digests[pair.image] for pair in held.pairs}
        number = counted(len(pictures), "image")
        say(f"train-dpo: {counted(len(held.pairs), 'held-out pair')} of {number}")


def keep_fitting(
    items: Sequence[T], *, lengths: Sequence[RowLength], recipe: TrainRecipe
) -> tuple[tuple[T, ...], tuple[RowLength, ...]]:
    """The `items` within `max_length`, and their lengths.

    Longer items are an error if `too_long` is `refuse` or no item is left.
    """
    both = zip(items, lengths, strict=True)
    fitting = [(item, n) for item, n in both if n.total <= recipe.max_length]
    kept, of_kept = tuple(zip(*fitting, strict=True)) or ((), ())
    num_long = len(items) - len(kept)
    if num_long and (recipe.too_long == "refuse" or not kept):
        longest = max(length.total for length in lengths)
        raise _recipe_error(
            f"{num_long} of {len(items)} pairs are too long: the longest has {longest} "
            f"tokens with its image, max_length is {recipe.max_length}",
            remedy=f"--set max_length={longest}, or --set too_long=drop",
        )
    if num_long and int(os.environ.get("RANK", "0")) == 0:
        say(f"train-dpo: dropping {num_long} of {len(items)} pairs that exceed max_length")
    return kept, of_kept
