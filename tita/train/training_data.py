"""Training data: read and checked, formatted as at inference, and collated into batches."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import Image
from transformers import AutoConfig
from trl.trainer.utils import flush_left

from tita.data import Dataset as RowDataset
from tita.data import open_dataset
from tita.data.balance import balance_answers
from tita.data.shortcuts import Shortcuts
from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.records import ContextTurn, Pair, Question
from tita.storage import Store, resolve
from tita.storage.manifest import build_manifest
from tita.terminal import say
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

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns from which TRL reads the reference model's log-probabilities."""
IGNORED = -100
"""Label of tokens without a loss; torch's `ignore_index`."""

Rows = Sequence[Mapping[str, Any]]


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

    @property
    def image_names(self) -> list[str]:
        return sorted({p.image for p in self.pairs} | {str(q.image) for q in self.answers})

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
    )
    for name in inputs.image_names:
        # Preflight opens every image; a missing one is found sooner here.
        if not (inputs.images / name).is_file():
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
    if source.images != pair_images:
        raise TitaError(
            "its images are not in the same folder as those of the pairs",
            where=str(path),
            remedy="set `images` to one folder for both, or embed the images of both in the rows",
        )
    for question in answers:
        if not (question.references and question.image):
            raise TitaError(
                f"question {question.id!r} has no answer or no image",
                where=str(path),
                remedy="add both or remove the question",
            )
    return answers


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
    digests: dict[str, str] | None = None
    """If given, collects the SHA-256 of every image that is opened."""

    def format_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row for the collators, from the fields of a `Pair` or a `Question`.

        Both have `prompt` and `pictures`; pairs have `chosen` and `rejected`, questions their first
        reference as `answer`.
        """
        if "chosen" in row:
            text, answers = row["question"], {name: row[name] for name in ("chosen", "rejected")}
        else:
            text, answers = row["text"], {"answer": row["references"][0]}
        image = self._open(row["image"])
        context = [ContextTurn(**turn) for turn in row["context"]]
        prompt = Prompt(turns=to_turns(context, text, (image,)))
        return {
            "prompt": prompt_text(self.processor, prompt),
            # Not `images`: TRL refuses to precompute the reference for a column of that name.
            "pictures": [pad_to_square(image) if self.image_aspect == "pad" else image],
            **{
                name: completion_text(self.processor, prompt, answer)
                for name, answer in answers.items()
            },
            **{name: row[name] for name in REFERENCE if name in row},
        }

    def _open(self, name: str) -> Image:
        path = self.images / name
        if self.digests is None or not os.access(path, os.R_OK):
            return open_image(path)
        data = path.read_bytes()
        self.digests[name] = hashlib.sha256(data).hexdigest()
        return open_image(data, where=str(path))


def make_dataset(
    records: Sequence[Pair] | Sequence[Question],
    *,
    images: Path,
    processor: Any,
    image_aspect: Aspect,
) -> Dataset:
    """The rows for `PairCollator` or `AnswerCollator`; images are opened when a row is read."""
    formatter = RowFormatter(images=images, processor=processor, image_aspect=image_aspect)

    def transform(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = zip(*batch.values(), strict=True)
        rows = [formatter.format_row(dict(zip(batch, row, strict=True))) for row in columns]
        return {name: [row[name] for row in rows] for name in rows[0]}

    return Dataset.from_list([asdict(record) for record in records]).with_transform(transform)


def count_tokens(rows: Iterable[Mapping[str, Any]], *, processor: Any) -> Iterator[int]:
    """Tokens of each row with its longest answer, image tokens included."""
    for row in rows:
        prompt = prompt_token_ids(row, processor=processor)
        answers = (row[name] for name in ("chosen", "rejected", "answer") if name in row)
        ids = (completion_ids(processor, row["prompt"], answer) for answer in answers)
        yield len(prompt) + max(map(len, ids))


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


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Batches of pairs. Each prompt is tokenized and each image processed once.

    TRL's `DataCollatorForVisionPreference` makes the same batches but processes each image twice.
    Nothing is truncated: preflight checks that every pair fits.
    """

    processor: Any

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs `[2B, L]`: the chosen answers of all B pairs, then the rejected ones."""
        answers = [[row[name] for row in rows] for name in ("chosen", "rejected")]
        batch = _encode(rows, answers=answers, processor=self.processor)
        if REFERENCE[0] in rows[0]:
            batch |= {name: torch.tensor([float(row[name]) for row in rows]) for name in REFERENCE}
        return batch


@dataclass(frozen=True, slots=True)
class AnswerCollator:
    """Batches of questions with one answer each, for supervised training on the answers."""

    processor: Any

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs `[B, L]` and `labels[B, L]` that contain the answers alone."""
        answers = [[row["answer"] for row in rows]]
        batch = _encode(rows, answers=answers, processor=self.processor)
        completion_mask = batch.pop("completion_mask")
        batch["labels"] = batch["input_ids"].masked_fill(completion_mask == 0, IGNORED)
        return batch


def _encode(rows: Rows, *, answers: Sequence[Sequence[str]], processor: Any) -> dict[str, Any]:
    """Model inputs `[K B, L]`, where K lists of B answers share the B prompts of `rows`."""
    prompts = processor(
        images=[row["pictures"] for row in rows],
        text=[row["prompt"] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(processor, rows[0]["prompt"]),
    )
    ids_of_answers = [
        completion_ids(processor, row["prompt"], answer)
        for some in answers
        for row, answer in zip(rows, some, strict=True)
    ]
    completions = processor.tokenizer.pad(
        {"input_ids": ids_of_answers}, padding_side="right", return_tensors="pt"
    )
    batch = {name: torch.cat([tensor] * len(answers)) for name, tensor in prompts.items()}
    prompt_mask, answer_mask = batch.pop("attention_mask"), completions["attention_mask"]
    ids = torch.cat([batch.pop("input_ids"), completions["input_ids"]], dim=1)
    completion_mask = torch.cat([torch.zeros_like(prompt_mask), answer_mask], dim=1)
    # Per-token inputs of some models, such as Qwen's `mm_token_type_ids`, are 0 in answers.
    extras = {
        name: torch.cat([batch.pop(name), torch.zeros_like(answer_mask)], dim=1)
        for name in ("token_type_ids", "mm_token_type_ids")
        if name in batch
    }
    mask, ids, completion_mask, *rest = flush_left(
        torch.cat([prompt_mask, answer_mask], dim=1), ids, completion_mask, *extras.values()
    )
    batch |= {"input_ids": ids, "attention_mask": mask, "completion_mask": completion_mask}
    return batch | dict(zip(extras, rest, strict=True))
