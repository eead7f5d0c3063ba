"""What a run reads, found and checked before anything expensive begins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tita.data import open_dataset
from tita.errors import TitaError
from tita.jobspec import deepspeed_config
from tita.recipes import TrainRecipe
from tita.records import Pair, Question
from tita.storage import Store, resolve
from tita.storage.manifest import describe
from tita.vlm import (
    Aspect,
    Prompt,
    adds_special_tokens,
    aspect_of,
    locate_model,
    open_image,
    pad_to_square,
    prompt_text,
    telling_load_errors,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads, on this machine."""

    model: str
    """A local folder or a hub name."""
    model_name: str
    """What it is called elsewhere too: as the recipe names it, or a tree in the store."""
    image_aspect: Aspect
    """How the model is shown images, in the warm-up and after."""
    pairs: tuple[Pair, ...]
    pairs_path: Path
    answers: tuple[Question, ...]
    """What the warm-up learns: the first reference of each is the answer."""
    images: Path


def read_inputs(recipe: TrainRecipe, *, store: Store) -> Inputs:
    """Find and read everything a run reads; images are looked for, and opened later.

    Raises:
        TitaError: something is missing or broken; nothing was started.
    """
    deepspeed_config(recipe.deepspeed)
    model = locate_model(recipe.model, store=store)
    path = resolve(recipe.pairs, store=store)
    source = open_dataset(path, images=_images_of(recipe, store=store))
    pairs = tuple(source.pairs())
    if not pairs:
        raise TitaError("no pairs", where=str(path), remedy="build some with `tita build-pairs`")
    answers = _read_answers(recipe, pairs=pairs, images=source.images, store=store)
    shown = {p.image for p in pairs} | {str(q.image) for q in answers}
    _look_for_images(shown, images=source.images)
    return Inputs(
        model=model,
        model_name=recipe.model,
        image_aspect=_aspect_of(recipe, model=model),
        pairs=pairs,
        pairs_path=path,
        answers=answers,
        images=source.images,
    )


def _aspect_of(recipe: TrainRecipe, *, model: str) -> Aspect:
    from transformers import AutoConfig

    with telling_load_errors(recipe.model):
        config = AutoConfig.from_pretrained(model)
    return aspect_of(config, wanted=recipe.image_aspect)


def _images_of(recipe: TrainRecipe, *, store: Store) -> Path | None:
    return None if recipe.images is None else resolve(recipe.images, store=store)


def _read_answers(
    recipe: TrainRecipe, *, pairs: Sequence[Pair], images: Path, store: Store
) -> tuple[Question, ...]:
    if recipe.sft is None:
        return ()
    if recipe.sft.answers is None:
        return tuple(
            Question(id=pair.id, text=pair.question, image=pair.image, references=(pair.chosen,))
            for pair in pairs
        )
    path = resolve(recipe.sft.answers, store=store)
    source = open_dataset(path, images=_images_of(recipe, store=store))
    answers = tuple(source.questions())
    if not answers:
        raise TitaError("no answers", where=str(path), remedy="leave out sft.answers")
    if source.images != images:
        raise TitaError(
            "its images lie elsewhere than those of the pairs",
            where=str(path),
            remedy="name one folder for both in `images`, or keep those of both inside the rows",
        )
    for question in answers:
        if not (question.references and question.image):
            raise TitaError(
                f"question {question.id!r} lacks an answer or an image",
                where=str(path),
                remedy="give it both or drop it",
            )
    return answers


def _look_for_images(names: set[str], *, images: Path) -> None:
    """Preflight opens every image; that one is missing can be told at once."""
    for name in sorted(names):
        if not (images / name).is_file():
            open_image(images / name)


def make_dataset(
    pairs: Sequence[Pair], *, images: Path, processor: Any, image_aspect: Aspect
) -> Any:
    """A `datasets.Dataset` for `PairCollator`: `prompt`, `chosen`, `rejected`, `pictures`.

    Texts are in the model's chat template already: TRL's own templating is for its conversational
    form, and its plain form adds no end-of-text to vision data, so the answers carry theirs. Images
    are opened when a row is asked for.
    """
    shown = _Shown(images=images, processor=processor, image_aspect=image_aspect)

    def rows(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            **shown.prompts(batch["question"], images=batch["image"]),
            "chosen": shown.ended(batch["chosen"]),
            "rejected": shown.ended(batch["rejected"]),
            **{name: batch[name] for name in REFERENCE if name in batch},
        }

    return _dataset([asdict(pair) for pair in pairs], rows)


def make_answers(
    questions: Sequence[Question], *, images: Path, processor: Any, image_aspect: Aspect
) -> Any:
    """A `datasets.Dataset` for `AnswerCollator`: `prompt`, `answer`, `pictures`.

    The answer is the question's first reference.
    """
    shown = _Shown(images=images, processor=processor, image_aspect=image_aspect)

    def rows(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            **shown.prompts(batch["text"], images=batch["image"]),
            "answer": shown.ended([references[0] for references in batch["references"]]),
        }

    return _dataset([asdict(question) for question in questions], rows)


def _dataset(records: list[dict[str, Any]], rows: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list(records).with_transform(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """Questions and images as this model is shown them."""

    images: Path
    processor: Any
    image_aspect: Aspect

    def prompts(self, texts: list[str], *, images: list[str]) -> dict[str, list[Any]]:
        opened = [open_image(self.images / name) for name in images]
        return {
            "prompt": [
                prompt_text(self.processor, Prompt(text=text, images=(image,)))
                for text, image in zip(texts, opened, strict=True)
            ],
            # Not `images`: for a column of that name TRL refuses to remember the reference.
            "pictures": [[self._aspect(image)] for image in opened],
        }

    def ended(self, answers: list[str]) -> list[str]:
        return [answer + self.processor.tokenizer.eos_token for answer in answers]

    def _aspect(self, image: "Image") -> "Image":
        return pad_to_square(image) if self.image_aspect == "pad" else image


def lengths(rows: Any, *, processor: Any) -> Iterator[int]:
    """Tokens of each row with its longest answer, image tokens included.

    Raises:
        TitaError: the model's processor refuses an image or its prompt.
    """
    for row in rows:
        prompt = token_ids(row, processor=processor)
        answers = [row[name] for name in ("chosen", "rejected", "answer") if name in row]
        ends = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
        yield len(prompt) + max(map(len, ends))


def token_ids(row: Mapping[str, Any], *, processor: Any) -> list[int]:
    """The prompt's tokens, image tokens included.

    Raises:
        TitaError: the model's processor refuses an image or its prompt.
    """
    try:
        found: list[int] = processor(
            text=[row["prompt"]],
            images=[row["pictures"]],
            add_special_tokens=adds_special_tokens(processor, row["prompt"]),
        )["input_ids"][0]
    except ValueError as error:
        # Some take no image two hundred times as wide as high.
        width, height = row["pictures"][0].size
        raise TitaError(
            f"the model's processor refuses it ({(str(error).splitlines() or [''])[0]})",
            where=f"prompt {row['prompt'][:80]!r} with an image of {width} x {height}",
            remedy="leave this pair out, or mend its image",
        ) from error
    return found


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns that TRL reads the reference's log-probabilities from."""
IGNORED = -100
"""Label of a token that no loss is taken of; torch's own `ignore_index`."""

Rows = Sequence[Mapping[str, Any]]


class PairCollator:
    """Does what TRL's `DataCollatorForVisionPreference` does, which prepares each image twice.

    Nothing is cut: preflight has looked that everything fits.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs of 2B sequences: the chosen answers of all B pairs, then the rejected."""
        import torch

        answers = [[row[name] for row in rows] for name in ("chosen", "rejected")]
        batch = _encode(rows, answers=answers, processor=self._processor)
        if REFERENCE[0] in rows[0]:
            batch |= {name: torch.tensor([float(row[name]) for row in rows]) for name in REFERENCE}
        return batch


class AnswerCollator:
    """Batches of questions with one answer each, for supervised steps on the answers."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Model inputs of B sequences, with `labels[B, L]` that hold the answers alone."""
        answers = [[row["answer"] for row in rows]]
        batch = _encode(rows, answers=answers, processor=self._processor)
        answered = batch.pop("completion_mask")
        batch["labels"] = batch["input_ids"].masked_fill(answered == 0, IGNORED)
        return batch


def _encode(rows: Rows, *, answers: Sequence[Sequence[str]], processor: Any) -> dict[str, Any]:
    """Model inputs of K B sequences, where K lists of B answers share the B prompts of `rows`."""
    import torch
    from trl.trainer.utils import flush_left

    prompts = processor(
        images=[row["pictures"] for row in rows],
        text=[row["prompt"] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(processor, rows[0]["prompt"]),
    )
    ends = processor.tokenizer(
        [answer for some in answers for answer in some],
        padding=True,
        padding_side="right",
        return_tensors="pt",
        add_special_tokens=False,
    )
    batch = {name: torch.cat([tensor] * len(answers)) for name, tensor in prompts.items()}
    prompt_mask, answer_mask = batch.pop("attention_mask"), ends["attention_mask"]
    ids = torch.cat([batch.pop("input_ids"), ends["input_ids"]], dim=1)
    completion = torch.cat([torch.zeros_like(prompt_mask), answer_mask], dim=1)
    # Per-token extras of some models, such as Qwen's `mm_token_type_ids`, are 0 in answers.
    extras = {
        name: torch.cat([batch.pop(name), torch.zeros_like(answer_mask)], dim=1)
        for name in ("token_type_ids", "mm_token_type_ids")
        if name in batch
    }
    mask, ids, completion, *rest = flush_left(
        torch.cat([prompt_mask, answer_mask], dim=1), ids, completion, *extras.values()
    )
    batch |= {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    return batch | dict(zip(extras, rest, strict=True))


def start_digest(model: str) -> str:
    """What tells this starting model from others: its files' digest, or a hub model's name.

    A model's folder holds the chat template and the image processor too: the prompt format.
    """
    return describe(Path(model)).digest if Path(model).is_dir() else model
