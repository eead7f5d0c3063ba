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
    completion_texts,
    prompt_text,
    to_turns,
)

_A_PIXEL = (PIL.Image.new("RGB", (1, 1)),)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """The texts of a row."""

    question: str
    answers: Sequence[str]
    has_image: bool
    context: Sequence[ContextTurn] = ()


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
        row = TextRow(question=question, answers=answers, has_image=bool(size), context=context)
        (total,) = self.count_texts([row])
        return total + (self.count_image(size) if size else 0)

    def count_texts(self, rows: Sequence["TextRow"]) -> list[int]:
        """As `count`, of several rows and without their images, by one call of the tokenizer."""
        prompts: list[str] = []
        texts: dict[bool, list[str]] = {True: [], False: []}
        completions: list[list[str]] = []
        for row in rows:
            # The chat template depends on whether there is an image, not on its pixels.
            prompt = Prompt(
                turns=to_turns(row.context, row.question, _A_PIXEL if row.has_image else ())
            )
            begin = prompt_text(self.processor, prompt, where=self.where)
            own = completion_texts(self.processor, prompt, row.answers, begin=begin)
            prompts.append(begin)
            completions.append(own)
            is_special = adds_special_tokens(self.processor, begin)
            texts[is_special] += [begin, *(begin + completion for completion in own)]
        ids = {
            is_special: iter(
                self.processor.tokenizer(some, add_special_tokens=is_special)["input_ids"]
            )
            for is_special, some in texts.items()
            if some
        }
        found = []
        for begin, own in zip(prompts, completions, strict=True):
            tokens = ids[adds_special_tokens(self.processor, begin)]
            start, longest = next(tokens), 0
            for completion in own:
                # As `completion_ids`.
                whole = next(tokens)
                number = len(whole) - len(start)
                if whole[: len(start)] != start:
                    alone = self.processor.tokenizer(completion, add_special_tokens=False)
                    number = len(alone["input_ids"])
                longest = max(longest, number)
            found.append(len(start) + longest)
        return found

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
                return_tensors="pt",
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
