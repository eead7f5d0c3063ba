"""Prompts, and their text in a model's own chat template. Imports no torch.

The same `Prompt` goes to every model. Text written by people stays text: a string in it that the
model would read as a control token is escaped with a blank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tita.errors import TitaError
from tita.vlm.images import Picture


class BadConversation(TitaError):
    """The model's chat template cannot express this, or its image marks and images differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation; `parts` are its texts and images in order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt before any model's template: the same for base, reward and reference.

    It takes one of four forms: `text` and `images`; a whole conversation in `turns`; `raw`, a
    prompt already in the model's template with `<image>` at the place of each of `images`; or
    `token_ids`, the base model's, without images.
    """

    text: str = ""
    images: tuple[Picture, ...] = ()
    turns: tuple[Turn, ...] = ()
    raw: str | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """The prompt as turns; a question's images come before its text."""
        return self.turns or (Turn(role="user", parts=(*self.images, self.text)),)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All images, in order."""
        return tuple(
            part for turn in self.conversation for part in turn.parts if not isinstance(part, str)
        )


def prompt_text(processor: Any, prompt: Prompt, *, where: str = "model") -> str:
    """The prompt in the model's chat template, up to the beginning of its answer.

    Raises:
        BadConversation: the template does not accept these turns, or an image among them.
        TitaError: the processor has no chat template.
    """
    if prompt.raw is not None:
        marks, num_images = prompt.raw.count("<image>"), len(prompt.pictures)
        if marks != num_images:
            raise BadConversation(
                f"number of images ({num_images}) does not match number of <image> tokens "
                f"in prompt ({marks})"
            )
        pieces = [_escape(processor, piece) for piece in prompt.raw.split("<image>")]
        return str(processor.image_token).join(pieces)
    if getattr(processor, "chat_template", None) is None:
        raise TitaError(
            "has no chat template", where=where, remedy="save chat_template.jinja beside the model"
        )
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": _escape(processor, part)}
                if isinstance(part, str)
                else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in prompt.conversation
    ]
    try:
        text: str = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        # Templates raise on a role, or an order of roles, that they do not support.
        raise BadConversation(
            f"the model's chat template does not accept this conversation ({error})"
        ) from None
    counts = [text.count(mark) for mark in _image_marks(processor)]
    if counts and len(prompt.pictures) not in counts:
        raise BadConversation("the model's chat template does not accept images here")
    return text


def check_token_ids(processor: Any, token_ids: Sequence[int]) -> None:
    """Check a prompt of token ids.

    Raises:
        BadConversation: the tokenizer has no such token, or it stands for an image.
    """
    tokenizer = processor.tokenizer
    images = {tokenizer.convert_tokens_to_ids(mark) for mark in _image_marks(processor)}
    for token in token_ids:
        if not 0 <= token < len(tokenizer):
            raise BadConversation(
                f"there is no token {token}; the last one is {len(tokenizer) - 1}"
            )
        if token in images:
            raise BadConversation(f"token {token} stands for an image; send the prompt as text")


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether the tokenizer has to put its beginning-of-text token before a prompt.

    Some templates contain it (demo, Llama 3), others leave it to the tokenizer (LLaVA-1.5); the
    rule is that of transformers' `ProcessorMixin.apply_chat_template`.
    """
    begin = processor.tokenizer.bos_token
    return begin is None or not text.startswith(begin)


def _escape(processor: Any, text: str) -> str:
    """The text with a blank inside every string that the model reads as a control token."""
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = {
        *_image_marks(processor),
        *tokenizer.all_special_tokens,
        *(token.content for token in added if token.special),
    }
    for mark in sorted(marks, key=len, reverse=True):
        if len(mark) > 1:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def _image_marks(processor: Any) -> list[str]:
    """Tokens that may stand for an image in a prompt; Gemma's templates use one of their own."""
    names = ("image_token", "boi_token")
    return [mark for name in names if isinstance(mark := getattr(processor, name, None), str)]
