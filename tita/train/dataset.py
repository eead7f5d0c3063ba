"""From preference pairs to the rows that TRL's trainers take, formatted as at inference."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tita.errors import TitaError
from tita.records import Pair, Question
from tita.train.collate import REFERENCE
from tita.vlm import Aspect, Prompt, adds_special_tokens, open_image, pad_to_square, prompt_text

if TYPE_CHECKING:
    from PIL.Image import Image


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
