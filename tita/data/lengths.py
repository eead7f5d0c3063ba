"""How many tokens a row takes in a model, image included, counted by the model's processor."""

from collections.abc import Sequence
from typing import Any, Literal

from tita.data.validate import Limit
from tita.errors import TitaError
from tita.vlm import (
    Prompt,
    hush_transformers,
    locate_model,
    pad_to_square,
    prompt_text,
    telling_load_errors,
)


def limit_of(
    where: str, *, max_length: int | None = None, image_aspect: Literal["pad", "keep"] = "pad"
) -> Limit:
    """The limit of the model at `where`; its weights are not loaded.

    Args:
        where: a tree in the store, a path, or a hub name.
        max_length: tokens of prompt and answer; the model's context if not given.
        image_aspect: how the model wants its images, see `tita.vlm.VLM`.

    Raises:
        TitaError: nothing there, or it does not say how long its context is.
    """
    from transformers import AutoConfig, AutoProcessor

    hush_transformers()
    source = locate_model(where)
    with telling_load_errors(where):
        processor = AutoProcessor.from_pretrained(source)
        config = AutoConfig.from_pretrained(source).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if max_length is None and context is None:
        raise TitaError(
            "does not say how long its context is", where=where, remedy="give --max-length"
        )
    tokens = min(n for n in (max_length, context) if n is not None)
    return Limit(
        tokens=tokens, measure=_Counting(processor, where=where, pad=image_aspect == "pad")
    )


class _Counting:
    """Counts text by the tokenizer, and the tokens of an image once for each size."""

    def __init__(self, processor: Any, *, where: str, pad: bool) -> None:
        self._processor = processor
        self._where = where
        self._pad = pad
        self._extra: dict[tuple[int, int], int] = {}

    def __call__(
        self, question: str, answers: Sequence[str], *, size: tuple[int, int] | None
    ) -> int:
        import PIL.Image

        tokenizer = self._processor.tokenizer
        # A template looks at whether there is an image, not at its pixels.
        images = (PIL.Image.new("RGB", (1, 1)),) if size else ()
        text = prompt_text(self._processor, Prompt(text=question, images=images), where=self._where)
        total = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if answers:
            ended = [answer + (tokenizer.eos_token or "") for answer in answers]
            total += max(map(len, tokenizer(ended, add_special_tokens=False)["input_ids"]))
        return total + (self._extra_of(size) if size else 0)

    def _extra_of(self, size: tuple[int, int]) -> int:
        """Tokens that an image of this size puts in place of the one that marks it."""
        import PIL.Image

        if size not in self._extra:
            image = PIL.Image.new("RGB", size)
            shown = pad_to_square(image) if self._pad else image
            text = prompt_text(
                self._processor, Prompt(text="?", images=(shown,)), where=self._where
            )
            whole = self._processor(text=[text], images=[[shown]], add_special_tokens=False)
            marked = self._processor.tokenizer(text, add_special_tokens=False)
            self._extra[size] = len(whole["input_ids"][0]) - len(marked["input_ids"])
        return self._extra[size]
