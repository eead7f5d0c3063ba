"""Changed rows of every layout are read right or refused, never read as something else."""

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_layouts import IMAGES, NAMES, rows_of
from tita.data import column_names as names
from tita.data.dataset import find_image
from tita.data.layouts import Example, read_examples
from tita.data.rows import RawRow, read_rows
from tita.errors import TitaError

NUMBER = 500
SPELLINGS = (
    names.QUESTION,
    names.REJECTED,
    names.SYSTEM,
    names.CONVERSATION,
    names.REFERENCES,
    (*names.IMAGE, *names.IMAGE_ID),
    names.ID,
    names.CHOICES,
)
"""Columns that mean the same."""


def content(example: Example) -> Example:
    """What every mutation has to keep: all but the layout's name and the type of the id."""
    return replace(example, layout="", raw_id=None)


def without(example: Example, column: str) -> list[Example]:
    """Right readings of a row that lacks a column: the example without what stood there."""
    same = content(example)
    if column in names.ID:
        return [replace(same, id="rows:1")]
    if column in names.REFERENCES or column in ("response", "output", "solution"):
        # VQAv2 repeats the most common answer in a column of its own.
        fewer = ((), same.references[:1], same.references)
        return [replace(same, references=references) for references in fewer]
    if column in names.BENCHMARK:
        return [replace(same, **{column: None})]
    if column in names.CHOICES:
        return [replace(same, choices=())]
    if any(column == letters[len(same.choices) - 1] for letters in names.LETTERED_CHOICES):
        return [replace(same, choices=same.choices[:-1])]
    if column in (*names.IMAGE, *names.IMAGE_ID) or names.NUMBERED_IMAGE.fullmatch(column):
        context = tuple(replace(turn, num_images=0) for turn in same.context)
        return [replace(same, images=(), context=context), same]
    if column in names.SYSTEM:
        return [replace(same, context=tuple(t for t in same.context if t.role != "system"))]
    if column == "history":
        system = tuple(turn for turn in same.context if turn.role == "system")
        return [replace(same, context=system)]
    if column == "input":
        return [replace(same, question=same.question.partition("\n")[0])]
    if column == "rejected_images":
        return [same]
    return [same] if column in names.METADATA else []


def as_question(example: Example) -> list[Example]:
    """A pair without its rejected answer: its conversation has the chosen one as reference."""
    asked = replace(content(example), chosen=None, rejected=None)
    return [asked, replace(asked, references=(str(example.chosen),))]


def mutate(
    row: Mapping[str, Any], column: str, *, rng: random.Random
) -> tuple[str, dict[str, Any], str]:
    """The kind of a mutation, the mutated row, and the column's new name."""
    value, new = row[column], column
    changed = dict(row)
    kind = rng.choice(("drop", "rename", "respell", "nest", "stringify"))
    if kind == "drop":
        del changed[column]
    elif kind in ("rename", "respell"):
        groups = [group for group in SPELLINGS if column in group]
        other = rng.choice(groups[0]) if groups and kind == "respell" else None
        new = other or rng.choice((column.upper(), f"{column}_path", f"my_{column}", f"{column}_x"))
        changed = {new if name == column else name: v for name, v in row.items()}
    elif kind == "nest":
        wrap = rng.choice(("value", "answer", "text", column))
        changed[column] = rng.choice(([value], [[value]], {wrap: value}))
    elif isinstance(value, bytes | str) or has_bytes(value):
        changed[column] = str(value)
    else:
        changed[column] = rng.choice((str, json.dumps))(value)
    return kind, changed, new


def has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(isinstance(part, bytes) for part in value.values())
    return isinstance(value, list) and any(map(has_bytes, value))


def raw(content: Mapping[str, Any]) -> RawRow:
    return RawRow(where="rows:1", file=Path("rows"), id="rows:1", content=content)


def read(row: Mapping[str, Any]) -> tuple[Example, ...]:
    """The examples of a row; a missing image is refused, as every command refuses it."""
    examples = read_examples(raw(row))
    for example in examples:
        for image in example.images:
            if isinstance(image, str) and find_image(image, images=IMAGES) is None:
                raise TitaError("no such image", where="rows:1")
    return examples


SOURCES = [
    (name, row.parse() if isinstance(row.parse(), dict) else dict(row.parse()))
    for name in NAMES
    for row in read_rows(rows_of(name))
]


def check(seed: int) -> tuple[str, str]:
    """Apply one mutation; returns its kind and how it ended."""
    rng = random.Random(seed)
    name, row = rng.choice(SOURCES)
    original = [replace(example, id=example.id) for example in read_examples(raw(row))]
    column = rng.choice([n for n, value in row.items() if value not in (None, "", [])])
    kind, changed, new = mutate(row, column, rng=rng)
    story = f"seed {seed}: {name}: {kind} {column!r} -> {new!r}: {changed}"
    problem: TitaError | None = None
    try:
        found = [content(example) for example in read(changed)]
    except TitaError as error:
        problem = error
    if problem is not None:
        assert problem.remedy or problem.what == "no such image", story
        return kind, "refused"
    right = [[content(example) for example in original]]
    if kind == "drop":
        options = [without(example, column) for example in original]
        right = [list(each) for each in zip(*options, strict=True)] if all(options) else []
        if original[0].is_pair and (column.startswith("rejected") or column == "completions"):
            # What is left is a conversation: questions, the last of which is that of the pair.
            right += [[*found[:-1], each] for each in as_question(original[-1])]
    # Another id may be the first of several, and one row may have more questions than pairs.
    found = [replace(each, id="") for each in found]
    right = [[replace(each, id="") for each in each_right] for each_right in right]
    assert found in right, f"{story}\n{found}"
    return kind, "read"


def test_five_hundred_mutations_are_read_right_or_refused() -> None:
    counts = Counter(check(seed) for seed in range(NUMBER))
    for kind in ("drop", "rename", "respell", "nest", "stringify"):
        assert counts[kind, "read"] + counts[kind, "refused"] > NUMBER / 10
    # A mutation test that refuses everything would prove nothing.
    for kind in ("drop", "respell", "stringify"):
        assert counts[kind, "read"] > 10, counts
    # Only `image` renamed to `image_path` is known again.
    assert counts["rename", "read"] < counts["rename", "refused"] / 10


@pytest.mark.soak
def test_many_mutations_are_read_right_or_refused() -> None:
    for seed in range(NUMBER, 40 * NUMBER):
        check(seed)
