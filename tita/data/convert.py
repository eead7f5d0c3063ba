"""Converts examples of any layout to the records that jobs exchange, `Question` and `Pair`."""

from collections.abc import Callable

from tita.data.layouts import Example
from tita.data.row_values import ImageValue
from tita.data.rows import RawRow
from tita.errors import TitaError
from tita.records import Pair, Question

ImageResolver = Callable[[ImageValue, RawRow], str]
"""Returns the path of an image relative to the image folder of its dataset."""


def to_question(example: Example, row: RawRow, *, resolve_image: ImageResolver) -> Question:
    """Convert an example to a question; that of a pair is one, too.

    Raises:
        TitaError: it has several images.
    """
    _check_images(example, row)
    return Question(
        id=example.id,
        text=example.question,
        image=resolve_image(example.images[0], row) if example.images else None,
        references=tuple(filter(None, example.references)),
        category=example.category,
        context=example.context,
    )


def to_pair(example: Example, row: RawRow, *, resolve_image: ImageResolver) -> Pair:
    """Convert an example to a preference pair.

    Raises:
        TitaError: it is a question, or does not have one image.
    """
    if example.chosen is None or example.rejected is None:
        raise TitaError(
            "a question, not a pair: no field 'chosen'",
            where=row.where,
            remedy="add both answers, or build pairs with `tita build-pairs`",
        )
    _check_images(example, row)
    if not example.images:
        raise TitaError("no field 'image_id'", where=row.where, remedy="add the path of the image")
    return Pair(
        id=example.id,
        image=resolve_image(example.images[0], row),
        question=example.question,
        chosen=example.chosen,
        rejected=example.rejected,
        context=example.context,
        rejected_image=None
        if example.rejected_image is None
        else resolve_image(example.rejected_image, row),
    )


def to_record(example: Example, row: RawRow, *, resolve_image: ImageResolver) -> Pair | Question:
    """Convert an example to a pair if it is one, else to a question."""
    return (to_pair if example.is_pair else to_question)(example, row, resolve_image=resolve_image)


def _check_images(example: Example, row: RawRow) -> None:
    if len(example.images) > 1:
        raise TitaError(
            f"{len(example.images)} images",
            where=row.where,
            remedy="keep one: a row has one image",
        )
