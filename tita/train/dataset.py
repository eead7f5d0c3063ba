"""From preference pairs to the rows that TRL's trainer takes, formatted as at inference."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tita.errors import TitaError
from tita.records import Pair
from tita.train.collate import REFERENCE
from tita.vlm import Prompt, open_image, pad_to_square, prompt_text

if TYPE_CHECKING:
    from PIL.Image import Image


def make_dataset(
    pairs: Sequence[Pair],
    *,
    images: Path,
    processor: Any,
    image_aspect: Literal["pad", "keep"],
) -> Any:
    """A `datasets.Dataset` for `PairCollator`: `prompt`, `chosen`, `rejected`, `pictures`.

    Texts are in the model's chat template already: TRL's own templating is for its conversational
    form, and its plain form adds no end-of-text to vision data, so the answers carry theirs. Images
    are opened when a row is asked for.
    """
    from datasets import Dataset

    end = processor.tokenizer.eos_token

    def rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        opened = [open_image(images / name) for name in batch["image"]]
        return {
            "prompt": [
                prompt_text(processor, Prompt(text=question, images=(image,)))
                for question, image in zip(batch["question"], opened, strict=True)
            ],
            "chosen": [answer + end for answer in batch["chosen"]],
            "rejected": [answer + end for answer in batch["rejected"]],
            # Not `images`: for a column of that name TRL refuses to remember the reference.
            "pictures": [
                [pad_to_square(image) if image_aspect == "pad" else image] for image in opened
            ],
            **{name: batch[name] for name in REFERENCE if name in batch},
        }

    return Dataset.from_list([asdict(pair) for pair in pairs]).with_transform(rows)


def check_fits(dataset: Any, *, processor: Any, max_length: int) -> int:
    """Tokens of the longest pair, image tokens included.

    Raises:
        TitaError: it is longer than `max_length`: cutting it could cut image tokens.
    """
    longest = 0
    for row in dataset:
        prompt = processor(
            text=[row["prompt"]], images=[row["pictures"]], add_special_tokens=False
        )["input_ids"][0]
        answers = processor.tokenizer([row["chosen"], row["rejected"]], add_special_tokens=False)[
            "input_ids"
        ]
        longest = max(longest, len(prompt) + max(map(len, answers)))
    if longest > max_length:
        raise TitaError(
            f"the longest pair has {longest} tokens, max_length is {max_length}",
            where="recipe of train-dpo",
            remedy=f"--set max_length={longest}",
        )
    return longest


def read_checked(pairs: Sequence[Pair], *, images: Path) -> None:
    """Look that every image of the pairs is there and can be opened.

    Raises:
        TitaError: names the first that is not.
    """
    for name in sorted({pair.image for pair in pairs}):
        opened: Image = open_image(images / name)
        opened.close()
