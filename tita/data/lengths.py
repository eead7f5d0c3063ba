"""How many tokens a row takes in a model, image included, counted by the model's processor."""

from collections.abc import Sequence
from typing import Any

from tita.data.validate import Limit
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.vlm import (
    Prompt,
    adds_special_tokens,
    aspect_of,
    hush_transformers,
    load_processor,
    locate_model,
    pad_to_square,
    prompt_text,
    telling_load_errors,
)


def limit_of(
    where: str, *, max_length: int | None = None, image_aspect: ImageAspect = "auto"
) -> Limit:
    """The limit of the model at `where`; its weights are not loaded.

    Args:
        where: a tree in the store, a path, or a hub name.
        max_length: tokens of prompt and answer; the model's context if not given.
        image_aspect: see `tita.vlm.aspect_of`.

    Raises:
        TitaError: nothing there, or it does not say how long its context is.
    """
    from transformers import AutoConfig

    hush_transformers()
    source = locate_model(where)
    with telling_load_errors(where):
        processor = load_processor(source, where=where)
        config = AutoConfig.from_pretrained(source)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None and context is None:
        raise TitaError(
            "does not say how long its context is", where=where, remedy="give --max-length"
        )
    tokens = min(n for n in (max_length, context) if n is not None)
    pad = aspect_of(config, wanted=image_aspect) == "pad"
    return Limit(tokens=tokens, measure=_Counting(processor, where=where, pad=pad))


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
        total = len(self._marked(text))
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
            begins = adds_special_tokens(self._processor, text)
            whole = self._processor(text=[text], images=[[shown]], add_special_tokens=begins)
            self._extra[size] = len(whole["input_ids"][0]) - len(self._marked(text))
        return self._extra[size]

    def _marked(self, text: str) -> list[int]:
        """Tokens of a prompt in which one stands for an image yet."""
        begins = adds_special_tokens(self._processor, text)
        found: list[int] = self._processor.tokenizer(text, add_special_tokens=begins)["input_ids"]
        return found
