"""Training data: read and checked, and formatted as at inference."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow  # type: ignore[import-untyped]
from datasets import Dataset
from datasets.table import InMemoryTable
from PIL.Image import Image
from transformers import AutoConfig

from tita.data.balance import balance_answers
from tita.data.digest_set import distinct
from tita.data.image_table import Images, ImageSource, ImageTable, open_picture
from tita.data.record_table import MappedRows, RecordTable, open_records, records_digest
from tita.data.shortcuts import Shortcuts
from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.records import ContextTurn, Pair, Question
from tita.storage import Store, resolve
from tita.storage.locate import digest_folder
from tita.terminal import say
from tita.train.collators import OTHER_REFERENCE, REFERENCE
from tita.train.negatives import Negative
from tita.vlm.images import Aspect, aspect_of, open_image, pad_to_square
from tita.vlm.loading import loaded_commit, locate_model, translate_load_errors
from tita.vlm.prompts import (
    Prompt,
    adds_special_tokens,
    completion_ids,
    completion_texts,
    prompt_text,
    to_turns,
)

R = TypeVar("R", Pair, Question)

_IDENTITY_VERSION = "1"
"""Increased when one of the digests of `data_identity` is computed in another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """What a run reads, on this machine."""

    model: str
    """A local folder or a hub name."""
    model_name: str
    """The model's name on any machine: as in the recipe, or a tree in the store."""
    image_aspect: Aspect
    """Aspect ratio of the images, in the warm-up and in DPO."""
    pairs: Sequence[Pair]
    pairs_path: Path
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of pairs that `balance` left out, by their chosen answer."""
    shortcuts: Shortcuts | None = None
    """What tells the answers of `pairs` apart without the image; preflight measures it on rank
    0."""
    answers: Sequence[Question]
    """Data of the warm-up, which learns the first reference of each question."""
    images: Images
    image_digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each image by its name; preflight fills it in."""
    negatives: Sequence[Negative] = ()
    """The negative image of each pair; empty if the loss has no image term."""
    validation: Sequence[Pair] = ()
    """Held-out pairs; preflight takes them from `pairs` if the recipe has a share."""
    validation_others: Sequence[Negative] = ()
    """Another pair's image for each held-out pair."""

    def images_digest(self) -> str:
        """SHA-256 over the names and digests of all images, in the order of their first rows."""
        digest = hashlib.sha256()
        for name in distinct(self._image_names()):
            digest.update(f"{self.image_digests[name]} {name}\n".encode())
        return digest.hexdigest()

    def _image_names(self) -> Iterator[str]:
        for pair in chain(self.pairs, self.validation):
            yield pair.image
            if pair.rejected_image is not None:
                yield pair.rejected_image
        yield from (str(question.image) for question in self.answers)


def read_inputs(recipe: TrainRecipe, *, store: Store) -> TrainInputs:
    """Find and read everything that a run needs, except the images themselves.

    Raises:
        TitaError: something is missing or invalid; nothing was started.
    """
    model = locate_model(recipe.model, store=store)
    path, table = _open(recipe.pairs, Pair, recipe=recipe, store=store)
    pairs: Sequence[Pair] = table
    if not pairs:
        raise TitaError("no pairs", where=str(path), remedy="build some with `tita build-pairs`")
    _check_rejected_images(recipe, pairs=table, where=str(path))
    left_out: Mapping[str, int] = {}
    if recipe.balance is not None:
        pairs, left_out = _balance(pairs, recipe=recipe, where=path)
    with translate_load_errors(recipe.model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    found = {path: table.source()}
    inputs = TrainInputs(
        model=model,
        model_name=recipe.model,
        image_aspect=aspect_of(config, wanted=recipe.image_aspect),
        pairs=pairs,
        pairs_path=path,
        left_out=left_out,
        answers=_read_answers(recipe, pairs=pairs, found=found, store=store),
        validation=_read_validation(recipe, found=found, store=store),
        images=_join(found),
    )
    _report_layouts(path, table)
    return inputs


def cache_rows(recipe: TrainRecipe, *, store: Store) -> None:
    """Read the rows of a run, so that the other processes of this node only map them.

    Raises:
        TitaError: a row is invalid, or an image is missing.
    """
    tables: list[RecordTable[Any]] = [_open(recipe.pairs, Pair, recipe=recipe, store=store)[1]]
    if recipe.sft is not None and recipe.sft.answers is not None:
        tables.append(_open(recipe.sft.answers, Question, recipe=recipe, store=store)[1])
    if isinstance(recipe.validation, str):
        tables.append(_open(recipe.validation, Pair, recipe=recipe, store=store)[1])
    for table in tables:
        # Here, because rows with a missing image are read again by every process.
        _check_images(table.images)


def _open(
    where: str, kind: type[R], *, recipe: TrainRecipe, store: Store
) -> tuple[Path, RecordTable[R]]:
    path = resolve(where, store=store)
    images = None if recipe.images is None else resolve(recipe.images, store=store)
    return path, open_records(path, kind, images=images, ignore=recipe.ignore_columns)


def _join(found: Mapping[Path, ImageSource]) -> ImageSource:
    """The images of all datasets of a run.

    Raises:
        TitaError: one is missing, or their files are in different folders.
    """
    tables = tuple(table for source in found.values() for table in source.tables)
    with_files = [(path, source) for path, source in found.items() if source.has_files]
    folder = (with_files[0][1] if with_files else next(iter(found.values()))).folder
    for path, source in with_files:
        if source.folder != folder:
            raise TitaError(
                "its images are not in the same folder as those of the pairs",
                where=str(path),
                remedy="set `images` to one folder for both, or embed the images of both in the "
                "rows",
            )
    for table in tables:
        _check_images(table)
    return ImageSource(tables=tables, folder=folder)


def _check_images(table: ImageTable) -> None:
    if table.missing is not None:
        open_image(table.folder / table.missing)


def _balance(
    pairs: Sequence[Pair], *, recipe: TrainRecipe, where: Path
) -> tuple[Sequence[Pair], Mapping[str, int]]:
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


def _chosen_answer(pair: Pair) -> Question:
    return Question(
        id=pair.id,
        text=pair.question,
        image=pair.image,
        references=(pair.chosen,),
        context=pair.context,
    )


def _read_answers(
    recipe: TrainRecipe, *, pairs: Sequence[Pair], found: dict[Path, ImageSource], store: Store
) -> Sequence[Question]:
    """The answers of the warm-up; adds their images to `found`."""
    if recipe.sft is None:
        return ()
    if recipe.sft.answers is None:
        return MappedRows(pairs, _chosen_answer)
    path, answers = _open(recipe.sft.answers, Question, recipe=recipe, store=store)
    _report_layouts(path, answers)
    if not answers:
        raise TitaError("no answers", where=str(path), remedy="remove sft.answers")
    found.setdefault(path, answers.source())
    for question in answers:
        if not (question.references and question.image):
            raise TitaError(
                f"question {question.id!r} has no answer or no image",
                where=str(path),
                remedy="add both or remove the question",
            )
    return answers


def _read_validation(
    recipe: TrainRecipe, *, found: dict[Path, ImageSource], store: Store
) -> Sequence[Pair]:
    """The held-out pairs of a path, none if the recipe has a share; adds their images to `found`.

    They are compared under other pairs' images, not under those of a column.
    """
    if not isinstance(recipe.validation, str):
        return ()
    path, pairs = _open(recipe.validation, Pair, recipe=recipe, store=store)
    _report_layouts(path, pairs)
    if not pairs:
        raise TitaError("no pairs", where=str(path), remedy="remove `validation`")
    found.setdefault(path, pairs.source())
    return MappedRows(pairs, _without_rejected_image)


def _without_rejected_image(pair: Pair) -> Pair:
    return replace(pair, rejected_image=None)


def _check_rejected_images(recipe: TrainRecipe, *, pairs: RecordTable[Pair], where: str) -> None:
    if recipe.image_preference is not None and (
        recipe.image_preference.negative == "rejected_image"
    ):
        return
    if number := pairs.count("rejected_image"):
        raise TitaError(
            f"{number:,} of {len(pairs):,} pairs have a `rejected_image`, which is not used",
            where=where,
            remedy="--set image_preference.negative=rejected_image, or "
            "--set 'ignore_columns=[rejected_image]'",
        )


def _report_layouts(path: Path, table: RecordTable[Any]) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{path.name}: {table.facts.layouts}")


def input_places(recipe: TrainRecipe) -> dict[str, str]:
    """What a run reads, by the recipe's names: where the recipe says that it is."""
    places = {"model": recipe.model, "pairs": recipe.pairs, "images": recipe.images or recipe.pairs}
    if isinstance(recipe.validation, str):
        places["validation"] = recipe.validation
    if recipe.sft is not None and recipe.sft.answers is not None:
        places["sft.answers"] = recipe.sft.answers
    return places


def rows_digests(inputs: TrainInputs, *, recipe: TrainRecipe) -> dict[str, str]:
    """The digests of the rows that were read, by the recipe's names."""
    rows: dict[str, Sequence[Pair | Question]] = {
        "pairs": inputs.pairs,
        "validation": inputs.validation,
        "sft.answers": inputs.answers,
    }
    named = input_places(recipe)
    return {name: records_digest(rows[name]).hex() for name in rows if name in named}


def data_identity(inputs: TrainInputs, *, recipe: TrainRecipe) -> dict[str, str]:
    """What a resumed run must find unchanged, on any machine and wherever the data are.

    Args:
        inputs: as they were read, with the images' digests.
        recipe: of the run.
    """
    found = rows_digests(inputs, recipe=recipe) | {"images": inputs.images_digest()}
    if Path(inputs.model).is_dir():
        # A commit of a hub model may change no weights.
        found["model"] = start_model_digest(inputs.model)
    return {"version": _IDENTITY_VERSION, **found}


@cache
def start_model_digest(model: str) -> str:
    """Identifies the starting model: the digest of its files, or a hub model's name and commit.

    Its folder includes the chat template and the image processor, that is, the prompt format.
    """
    if Path(model).is_dir():
        return digest_folder(Path(model))
    return f"{model}@{loaded_commit(model)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormatter:
    """Formats pairs and questions as this model's prompts.

    Texts are in the model's chat template already: TRL applies templates only to its conversational
    format, and to its plain vision format it adds no end-of-text token. Answers include the end of
    their turn.
    """

    images: Images
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
        begin = prompt_text(self.processor, prompt)
        completions = completion_texts(self.processor, prompt, [*answers.values()], begin=begin)
        return {
            "prompt": begin,
            # Not `images`: TRL refuses to precompute the reference for a column of that name.
            "pictures": [self._fit(image)],
            **others,
            **dict(zip(answers, completions, strict=True)),
            **{name: row[name] for name in (*REFERENCE, *OTHER_REFERENCE) if name in row},
        }

    def _fit(self, image: Image) -> Image:
        return pad_to_square(image) if self.image_aspect == "pad" else image

    def _open(self, name: str) -> Image:
        return open_picture(self.images, name)


def make_dataset(
    records: Sequence[Pair] | Sequence[Question],
    *,
    images: Images,
    processor: Any,
    image_aspect: Aspect,
    negatives: Sequence[Negative] = (),
    held_out: bool = False,
) -> Dataset:
    """The rows for `PairCollator` or `AnswerCollator`; images are opened when a row is read.

    Args:
        records: pairs or questions, which are made when a row is read.
        images: their images.
        processor: of the model.
        image_aspect: of the images that the model gets.
        negatives: the other image of each pair, if one is used.
        held_out: whether both answers are used under the other images.
    """
    formatter = RowFormatter(images=images, processor=processor, image_aspect=image_aspect)

    def fields_of(number: int) -> dict[str, Any]:
        row = asdict(records[number])
        if negatives:
            row |= {"negative": asdict(negatives[number]), "held_out": held_out}
        return row

    def transform(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = []
        for number, *values in zip(*batch.values(), strict=True):
            added = dict(zip(list(batch)[1:], values, strict=True))
            rows.append(formatter.format_row(fields_of(number) | added))
        return {name: [row[name] for row in rows] for name in rows[0]}

    # Columns that are added later come behind it.
    numbers = pyarrow.array(np.arange(len(records), dtype=np.int32))
    table = InMemoryTable(pyarrow.table({"number": numbers}))
    # Otherwise `datasets` hashes the whole table for a name of cache files that are never written.
    return Dataset(table, fingerprint=uuid4().hex).with_transform(transform)


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
        # Some processors, such as Ovis2's, read their own tensors to count the tokens of an image.
        found: list[int] = processor(
            text=[row["prompt"]],
            images=[row["pictures"]],
            add_special_tokens=adds_special_tokens(processor, row["prompt"]),
            return_tensors="pt",
        )["input_ids"][0].tolist()
    except ValueError as error:
        # Some processors limit the aspect ratio, for example to 200.
        width, height = row["pictures"][0].size
        raise TitaError(
            f"rejected by the model's processor ({(str(error).splitlines() or [''])[0]})",
            where=f"prompt {row['prompt'][:80]!r} with an image of {width} x {height}",
            remedy="remove this pair or fix its image",
        ) from error
    return found
