"""Counts the tokens of a dataset's rows with a model's processor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from transformers import AutoConfig

from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.records import ContextTurn
from tita.vlm.images import aspect_of, pad_to_square
from tita.vlm.loading import locate_model, silence_transformers, translate_load_errors
from tita.vlm.processors import load_processor
from tita.vlm.prompts import (
    Prompt,
    adds_special_tokens,
    completion_ids,
    completion_text,
    prompt_text,
    to_turns,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimit:
    """Counts the tokens of rows with a model's processor, against a maximum."""

    processor: Any
    max_tokens: int
    """Maximum number of tokens of a row."""
    where: str
    """Name of the model in error messages."""
    pad: bool
    """Whether images are padded to squares."""
    image_tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    """Number of tokens by image size, each counted once."""

    def count(
        self,
        question: str,
        answers: Sequence[str],
        *,
        size: tuple[int, int] | None,
        context: Sequence[ContextTurn] = (),
    ) -> int:
        """Return the tokens of a question with its context, an image and the longest answer.

        Args:
            question: its text.
            answers: of a pair.
            size: of the image in pixels; None without one.
            context: the turns before the question.
        """
        # The chat template depends on whether there is an image, not on its pixels.
        images = (PIL.Image.new("RGB", (1, 1)),) if size else ()
        prompt = Prompt(turns=to_turns(context, question, images))
        text = prompt_text(self.processor, prompt, where=self.where)
        total = len(self._tokenize(text))
        completions = [completion_text(self.processor, prompt, answer) for answer in answers]
        total += max(
            (len(completion_ids(self.processor, text, completion)) for completion in completions),
            default=0,
        )
        return total + (self.count_image(size) if size else 0)

    def count_image(self, size: tuple[int, int]) -> int:
        """Tokens of an image of this size, less the one placeholder for it in the prompt.

        Raises:
            ValueError: the processor rejects images of this size.
        """
        if size not in self.image_tokens:
            image = PIL.Image.new("RGB", size)
            shown = pad_to_square(image) if self.pad else image
            prompt = Prompt(text="?", images=(shown,))
            text = prompt_text(self.processor, prompt, where=self.where)
            inputs = self.processor(
                text=[text],
                images=[[shown]],
                add_special_tokens=adds_special_tokens(self.processor, text),
            )
            self.image_tokens[size] = len(inputs["input_ids"][0]) - len(self._tokenize(text))
        return self.image_tokens[size]

    def _tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt, with one placeholder per image."""
        special = adds_special_tokens(self.processor, text)
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids


def load_length_limit(
    model: str, *, max_length: int | None = None, image_aspect: ImageAspect = "auto"
) -> LengthLimit:
    """Load the processor of a model, without its weights.

    Args:
        model: a tree in the store, a path, or a name on the Hugging Face Hub.
        max_length: maximum tokens of prompt and answer; default: the model's context length.
        image_aspect: see `tita.vlm.images.aspect_of`.

    Raises:
        TitaError: there is no such model, or its configuration has no context length.
    """
    silence_transformers()
    source = locate_model(model)
    with translate_load_errors(model):
        processor = load_processor(source, where=model)
        config = AutoConfig.from_pretrained(source)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None and context is None:
        raise TitaError(
            "the model's configuration has no context length",
            where=model,
            remedy="set --max-length",
        )
    return LengthLimit(
        processor=processor,
        max_tokens=min(n for n in (max_length, context) if n is not None),
        where=model,
        pad=aspect_of(config, wanted=image_aspect) == "pad",
    )
