"""Training data: read and checked, and formatted as at inference."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow  # type: ignore[import-untyped]
from datasets import Dataset
from datasets.table import InMemoryTable
from PIL.Image import Image
from transformers import AutoConfig

from tita.data import Dataset as RowDataset
from tita.data import open_dataset
from tita.data.balance import balance_answers
from tita.data.shortcuts import Shortcuts
from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.records import ContextTurn, Pair, Question
from tita.storage import Store, resolve
from tita.storage.image_shards import is_image
from tita.storage.manifest import build_manifest
from tita.terminal import say
from tita.train.collators import OTHER_REFERENCE, REFERENCE
from tita.train.negatives import Negative
from tita.vlm.images import Aspect, aspect_of, open_image, pad_to_square
from tita.vlm.loading import locate_model, translate_load_errors
from tita.vlm.prompts import (
    Prompt,
    adds_special_tokens,
    completion_ids,
    completion_text,
    prompt_text,
    to_turns,
)

_CHUNK_ROWS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """What a run reads, on this machine."""

    model: str
    """A local folder or a hub name."""
    model_name: str
    """The model's name on any machine: as in the recipe, or a tree in the store."""
    image_aspect: Aspect
    """Aspect ratio of the images, in the warm-up and in DPO."""
    pairs: tuple[Pair, ...]
    pairs_path: Path
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of pairs that `balance` left out, by their chosen answer."""
    shortcuts: Shortcuts | None = None
    """What tells the answers of `pairs` apart without the image; preflight measures it on rank
    0."""
    answers: tuple[Question, ...]
    """Data of the warm-up, which learns the first reference of each question."""
    images: Path
    image_digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each image by its name; preflight fills it in."""
    negatives: tuple[Negative, ...] = ()
    """The negative image of each pair; empty if the loss has no image term."""
    validation: tuple[Pair, ...] = ()
    """Held-out pairs; preflight takes them from `pairs` if the recipe has a share."""
    validation_others: tuple[Negative, ...] = ()
    """Another pair's image for each held-out pair."""

    @property
    def image_names(self) -> list[str]:
        names = {pair.image for pair in (*self.pairs, *self.validation)}
        names |= {pair.rejected_image for pair in self.pairs if pair.rejected_image is not None}
        return sorted(names | {str(question.image) for question in self.answers})

    def images_digest(self) -> str:
        """SHA-256 over the names and digests of all images."""
        lines = (f"{self.image_digests[name]} {name}\n" for name in self.image_names)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_inputs(recipe: TrainRecipe, *, store: Store) -> TrainInputs:
    """Find and read everything that a run needs, except the images themselves.

    Raises:
        TitaError: something is missing or invalid; nothing was started.
    """
    model = locate_model(recipe.model, store=store)
    path = resolve(recipe.pairs, store=store)
    images = None if recipe.images is None else resolve(recipe.images, store=store)
    source = open_dataset(path, images=images, ignore=recipe.ignore_columns)
    pairs = tuple(source.pairs())
    if not pairs:
        raise TitaError("no pairs", where=str(path), remedy="build some with `tita build-pairs`")
    _check_rejected_images(recipe, pairs=pairs, where=str(path))
    left_out: Mapping[str, int] = {}
    if recipe.balance is not None:
        pairs, left_out = _balance(pairs, recipe=recipe, where=path)
    with translate_load_errors(recipe.model):
        config = AutoConfig.from_pretrained(model)
    inputs = TrainInputs(
        model=model,
        model_name=recipe.model,
        image_aspect=aspect_of(config, wanted=recipe.image_aspect),
        pairs=pairs,
        pairs_path=path,
        left_out=left_out,
        answers=_read_answers(recipe, pairs=pairs, pair_images=source.images, store=store),
        images=source.images,
        validation=_read_validation(recipe, pair_images=source.images, store=store),
    )
    for name in inputs.image_names:
        # Preflight opens every image; a missing one is found sooner here.
        if not is_image(inputs.images / name):
            open_image(inputs.images / name)
    _report_layouts(source)
    return inputs


def _balance(
    pairs: Sequence[Pair], *, recipe: TrainRecipe, where: Path
) -> tuple[tuple[Pair, ...], Mapping[str, int]]:
    balanced = balance_answers(pairs, seed=recipe.seed)
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{where.name}: balance: {balanced.describe()}")
    if not balanced.pairs:
        raise TitaError(
            "no pairs are left that balance each other's answers",
            where=str(where),
            remedy="add pairs that prefer the other answers, or remove `balance`",
        )
    return balanced.pairs, balanced.left_out


def _read_answers(
    recipe: TrainRecipe, *, pairs: Sequence[Pair], pair_images: Path, store: Store
) -> tuple[Question, ...]:
    if recipe.sft is None:
        return ()
    if recipe.sft.answers is None:
        return tuple(
            Question(
                id=pair.id,
                text=pair.question,
                image=pair.image,
                references=(pair.chosen,),
                context=pair.context,
            )
            for pair in pairs
        )
    path = resolve(recipe.sft.answers, store=store)
    images = None if recipe.images is None else resolve(recipe.images, store=store)
    source = open_dataset(path, images=images, ignore=recipe.ignore_columns)
    answers = tuple(source.questions())
    _report_layouts(source)
    if not answers:
        raise TitaError("no answers", where=str(path), remedy="remove sft.answers")
    _check_same_images(source, pair_images=pair_images)
    for question in answers:
        if not (question.references and question.image):
            raise TitaError(
                f"question {question.id!r} has no answer or no image",
                where=str(path),
                remedy="add both or remove the question",
            )
    return answers


def _read_validation(recipe: TrainRecipe, *, pair_images: Path, store: Store) -> tuple[Pair, ...]:
    """The held-out pairs of a path; none if the recipe has a share of the pairs."""
    if not isinstance(recipe.validation, str):
        return ()
    path = resolve(recipe.validation, store=store)
    images = None if recipe.images is None else resolve(recipe.images, store=store)
    source = open_dataset(path, images=images, ignore=recipe.ignore_columns)
    # Held-out pairs are compared under other pairs' images, not under those of a column.
    pairs = tuple(replace(pair, rejected_image=None) for pair in source.pairs())
    _report_layouts(source)
    if not pairs:
        raise TitaError("no pairs", where=str(path), remedy="remove `validation`")
    _check_same_images(source, pair_images=pair_images)
    return pairs


def _check_same_images(source: RowDataset, *, pair_images: Path) -> None:
    if source.images != pair_images:
        raise TitaError(
            "its images are not in the same folder as those of the pairs",
            where=str(source.path),
            remedy="set `images` to one folder for both, or embed the images of both in the rows",
        )


def _check_rejected_images(recipe: TrainRecipe, *, pairs: Sequence[Pair], where: str) -> None:
    if recipe.image_preference is not None and (
        recipe.image_preference.negative == "rejected_image"
    ):
        return
    number = sum(pair.rejected_image is not None for pair in pairs)
    if number:
        raise TitaError(
            f"{number:,} of {len(pairs):,} pairs have a `rejected_image`, which is not used",
            where=where,
            remedy="--set image_preference.negative=rejected_image, or "
            "--set 'ignore_columns=[rejected_image]'",
        )


def _report_layouts(source: RowDataset) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{source.path.name}: {source.layouts.describe()}")


@cache
def start_model_digest(model: str) -> str:
    """Identifies the starting model: the digest of its files, or a hub model's name.

    Its folder includes the chat template and the image processor, that is, the prompt format.
    """
    return build_manifest(Path(model)).digest if Path(model).is_dir() else model


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormatter:
    """Formats pairs and questions as this model's prompts.

    Texts are in the model's chat template already: TRL applies templates only to its conversational
    format, and to its plain vision format it adds no end-of-text token. Answers include the end of
    their turn.
    """

    images: Path
    processor: Any
    image_aspect: Aspect

    def format_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row for the collators, from the fields of a `Pair` or a `Question`.

        Both have `prompt` and `pictures`; pairs have `chosen` and `rejected`, questions their first
        reference as `answer`. Pairs with a `negative` have it as `other_pictures`, and
        `picture_names` that are equal for equal images.
        """
        if "chosen" in row:
            text, answers = row["question"], {name: row[name] for name in ("chosen", "rejected")}
        else:
            text, answers = row["text"], {"answer": row["references"][0]}
        image = self._open(row["image"])
        others: dict[str, Any] = {}
        if row.get("negative") is not None:
            negative = Negative(**row["negative"])
            source = image if negative.image == row["image"] else self._open(negative.image)
            others = {
                "other_pictures": [self._fit(negative.apply(source))],
                "picture_names": (row["image"], negative.key),
                "held_out": row.get("held_out", False),
            }
        context = [ContextTurn(**turn) for turn in row["context"]]
        prompt = Prompt(turns=to_turns(context, text, (image,)))
        return {
            "prompt": prompt_text(self.processor, prompt),
            # Not `images`: TRL refuses to precompute the reference for a column of that name.
            "pictures": [self._fit(image)],
            **others,
            **{
                name: completion_text(self.processor, prompt, answer)
                for name, answer in answers.items()
            },
            **{name: row[name] for name in (*REFERENCE, *OTHER_REFERENCE) if name in row},
        }

    def _fit(self, image: Image) -> Image:
        return pad_to_square(image) if self.image_aspect == "pad" else image

    def _open(self, name: str) -> Image:
        return open_image(self.images / name)


def make_dataset(
    records: Sequence[Pair] | Sequence[Question],
    *,
    images: Path,
    processor: Any,
    image_aspect: Aspect,
    negatives: Sequence[Negative] = (),
    held_out: bool = False,
) -> Dataset:
    """The rows for `PairCollator` or `AnswerCollator`; images are opened when a row is read.

    Args:
        records: pairs or questions.
        images: the folder of their images.
        processor: of the model.
        image_aspect: of the images that the model gets.
        negatives: the other image of each pair, if one is used.
        held_out: whether both answers are used under the other images.
    """
    formatter = RowFormatter(images=images, processor=processor, image_aspect=image_aspect)

    def transform(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = zip(*batch.values(), strict=True)
        rows = [formatter.format_row(dict(zip(batch, row, strict=True))) for row in columns]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def rows(first: int) -> Iterator[dict[str, Any]]:
        for number in range(first, min(first + _CHUNK_ROWS, len(records))):
            row = asdict(records[number])
            if negatives:
                row |= {"negative": asdict(negatives[number]), "held_out": held_out}
            yield row

    # In chunks: as one list of dicts, the rows need four times the memory of the table.
    schema = _schema(records[0], with_negatives=bool(negatives))
    chunks = [
        pyarrow.Table.from_pylist(list(rows(first)), schema=schema)
        for first in range(0, len(records), _CHUNK_ROWS)
    ]
    table = InMemoryTable(pyarrow.concat_tables(chunks))
    # Otherwise `datasets` hashes the whole table for a name of cache files that are never written.
    return Dataset(table, fingerprint=uuid4().hex).with_transform(transform)


def _schema(record: Pair | Question, *, with_negatives: bool) -> pyarrow.Schema:
    """The types of `asdict(record)`, whatever the values of the first rows are."""
    text = pyarrow.string()
    turn = pyarrow.struct([("role", text), ("text", text), ("num_images", pyarrow.int64())])
    lists = {"context": pyarrow.list_(turn), "references": pyarrow.list_(text)}
    types = [(item.name, lists.get(item.name, text)) for item in fields(record)]
    if with_negatives:
        seed = ("seed", pyarrow.int64())
        negative = pyarrow.struct([("image", text), ("change", text), seed])
        types += [("negative", negative), ("held_out", pyarrow.bool_())]
    return pyarrow.schema(types)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLength:
    """Numbers of tokens of one row."""

    total: int
    """With its image and its longest answer."""
    image: int
    """Those that the image adds to the prompt, with the text around its tiles."""
    other_image: int | None
    """The same for the image in `other_pictures`; None without one."""


def count_tokens(rows: Iterable[Mapping[str, Any]], *, processor: Any) -> Iterator[RowLength]:
    """The length of each row."""
    for row in rows:
        text = len(
            processor.tokenizer(
                row["prompt"],
                add_special_tokens=adds_special_tokens(processor, row["prompt"]),
            )["input_ids"]
        )
        prompt = len(prompt_token_ids(row, processor=processor))
        other = None
        if "other_pictures" in row:
            pictures = {**row, "pictures": row["other_pictures"]}
            other = len(prompt_token_ids(pictures, processor=processor)) - text
        answers = (row[name] for name in ("chosen", "rejected", "answer") if name in row)
        ids = (completion_ids(processor, row["prompt"], answer) for answer in answers)
        yield RowLength(total=prompt + max(map(len, ids)), image=prompt - text, other_image=other)


def prompt_token_ids(row: Mapping[str, Any], *, processor: Any) -> list[int]:
    """The prompt's tokens, image tokens included.

    Raises:
        TitaError: the model's processor rejects an image or its prompt.
    """
    try:
        found: list[int] = processor(
            text=[row["prompt"]],
            images=[row["pictures"]],
            add_special_tokens=adds_special_tokens(processor, row["prompt"]),
        )["input_ids"][0]
    except ValueError as error:
        # Some processors limit the aspect ratio, for example to 200.
        width, height = row["pictures"][0].size
        raise TitaError(
            f"rejected by the model's processor ({(str(error).splitlines() or [''])[0]})",
            where=f"prompt {row['prompt'][:80]!r} with an image of {width} x {height}",
            remedy="remove this pair or fix its image",
        ) from error
    return found
