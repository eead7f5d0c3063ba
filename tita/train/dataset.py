"""From preference pairs to the rows that TRL's trainer takes, formatted as at inference."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tita.errors import TitaError
from tita.records import Pair
from tita.vlm import Prompt, open_image, pad_to_square, prompt_text

if TYPE_CHECKING:
    from PIL.Image import Image


class PairDataset:
    """Rows `prompt`, `chosen`, `rejected`, `images`; images are opened when a row is asked for.

    Texts are in the model's chat template already: TRL's own templating is for its conversational
    form, and its plain form adds no end-of-text to vision data, so the answers carry theirs.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        images: Path,
        processor: Any,
        image_aspect: Literal["pad", "keep"],
    ) -> None:
        self._pairs = pairs
        self._images = images
        self._processor = processor
        self._pad = image_aspect == "pad"

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self._pairs[index]
        image = open_image(self._images / pair.image)
        end = self._processor.tokenizer.eos_token
        return {
            "prompt": prompt_text(self._processor, Prompt(text=pair.question, images=(image,))),
            "chosen": pair.chosen + end,
            "rejected": pair.rejected + end,
            "images": [pad_to_square(image) if self._pad else image],
        }


def check_fits(dataset: PairDataset, *, processor: Any, max_length: int) -> int:
    """Tokens of the longest pair, image tokens included.

    Raises:
        TitaError: it is longer than `max_length`: cutting it could cut image tokens.
    """
    longest = 0
    for index in range(len(dataset)):
        row = dataset[index]
        prompt = processor(text=[row["prompt"]], images=[row["images"]], add_special_tokens=False)[
            "input_ids"
        ][0]
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
