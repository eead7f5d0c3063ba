"""Prompts, and their text in a model's own chat template. Imports no torch.

The same `Prompt` goes to every model. Text written by people stays text: a string in it that the
model would read as a control token is escaped with a blank.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from tita.errors import TitaError
from tita.records import ContextTurn, turns_of
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


def to_turns(
    context: Sequence[ContextTurn], question: str, images: Sequence[Picture]
) -> tuple[Turn, ...]:
    """A question after its context as turns, with the images at their places.

    Args:
        context: the turns before the question.
        question: its text.
        images: those of all turns, in order.
    """
    turns, start = [], 0
    for turn in turns_of(context, question, num_images=len(images)):
        shown = images[start : start + turn.num_images]
        turns.append(Turn(role=turn.role, parts=turn.parts(shown)))
        start += turn.num_images
    return tuple(turns)


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
        controls = _control_tokens(processor)
        pieces = [_escape(piece, controls) for piece in prompt.raw.split("<image>")]
        return str(processor.image_token).join(pieces)
    if getattr(processor, "chat_template", None) is None:
        raise TitaError(
            "has no chat template", where=where, remedy="save chat_template.jinja beside the model"
        )
    text = _render(processor, prompt.conversation, is_prompt=True)
    counts = [text.count(mark) for mark in image_marks(processor)]
    if counts and len(prompt.pictures) not in counts:
        raise BadConversation("the model's chat template does not accept images here")
    return text


def completion_text(processor: Any, prompt: Prompt, answer: str) -> str:
    """An answer as it continues `prompt_text`; see `completion_texts`."""
    return completion_texts(processor, prompt, (answer,))[0]


def completion_texts(
    processor: Any, prompt: Prompt, answers: Sequence[str], *, begin: str | None = None
) -> list[str]:
    """Answers as they continue `prompt_text`, up to and including the end of their turn.

    The turn ends as the model's template ends it, once. A template that leaves the end to the
    tokenizer (LLaVA-1.5) gets the end-of-text token.

    Args:
        processor: of the model.
        prompt: what is answered.
        answers: their texts.
        begin: result of `prompt_text`, if it is known.

    Raises:
        BadConversation: the template does not accept these turns, or omits the answer.
    """
    begin = prompt_text(processor, prompt) if begin is None else begin

    def render(text: str) -> str:
        turns = (*prompt.conversation, Turn(role="assistant", parts=(text,)))
        return _render(processor, turns, is_prompt=False)

    start, found, end = render(_PROBE).rpartition(_PROBE)
    if not found:
        raise BadConversation("the model's chat template omits the assistant's answer")
    lead = start.removeprefix(begin) if start.startswith(begin) else ""
    eos_token, controls = processor.tokenizer.eos_token, _control_tokens(processor)
    has_end = any(mark in end for mark in controls)
    completions = []
    for text in answers:
        answer = _escape(strip_ends(text, eos_token=eos_token), controls)
        # Some templates strip the answer.
        if answer != answer.strip() and not render(answer).endswith(f"{lead}{answer}{end}"):
            answer = answer.strip()
        completions.append(f"{lead}{answer}{end if has_end else eos_token or ''}")
    return completions


_PROBE = "an-answer-that-no-template-contains"


def completion_ids(processor: Any, prompt: str, completion: str) -> list[int]:
    """Tokens of a completion behind its prompt, as in the tokens of the whole text.

    Alone, the completion may have other tokens: some tokenizers put a blank before a text.

    Args:
        processor: of the model.
        prompt: result of `prompt_text`.
        completion: result of `completion_text`.
    """
    tokenizer = processor.tokenizer
    special = adds_special_tokens(processor, prompt)
    begin, whole = tokenizer([prompt, prompt + completion], add_special_tokens=special)["input_ids"]
    if whole[: len(begin)] == begin:
        return list(whole[len(begin) :])
    alone: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return alone


def _render(processor: Any, turns: Sequence[Turn], *, is_prompt: bool) -> str:
    """The turns in the model's chat template, with the beginning of an answer if a prompt."""
    controls = _control_tokens(processor)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in _escape_parts(turn.parts, controls)
            ],
        }
        for turn in turns
    ]
    try:
        return str(
            processor.apply_chat_template(messages, add_generation_prompt=is_prompt, tokenize=False)
        )
    except Exception as error:
        # Templates raise on a role, or an order of roles, that they do not support.
        raise BadConversation(
            f"the model's chat template does not accept this conversation ({error})"
        ) from None


def check_token_ids(processor: Any, token_ids: Sequence[int]) -> None:
    """Check a prompt of token ids.

    Raises:
        BadConversation: the tokenizer has no such token, or it stands for an image.
    """
    tokenizer = processor.tokenizer
    check_known(tokenizer, token_ids)
    images = {tokenizer.convert_tokens_to_ids(mark) for mark in image_marks(processor)}
    for token in images.intersection(token_ids):
        raise BadConversation(f"token {token} stands for an image; send the prompt as text")


def check_known(tokenizer: Any, token_ids: Sequence[int]) -> None:
    """Check that a tokenizer has these tokens.

    Raises:
        BadConversation: it has not.
    """
    num_known = len(tokenizer)  # which counts them, so not for each token
    for token in token_ids:
        if not 0 <= token < num_known:
            raise BadConversation(f"there is no token {token}; the last one is {num_known - 1}")


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether the tokenizer has to put its beginning-of-text token before a prompt.

    Some templates contain it (demo, Llama 3), others leave it to the tokenizer (LLaVA-1.5); the
    rule is that of transformers' `ProcessorMixin.apply_chat_template`.
    """
    begin = processor.tokenizer.bos_token
    return begin is None or not text.startswith(begin)


_END_MARKS = (
    *("</s>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<eos>"),
    *("<end_of_utterance>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>"),
)
"""Ends of a turn in well-known templates, which answers of datasets may already have."""


def strip_ends(text: str, *, eos_token: str | None = None) -> str:
    """The text without ends of a turn behind it.

    Args:
        eos_token: the model's own, if it is known; it is removed, too.
    """
    marks = {*_END_MARKS, eos_token} if eos_token else {*_END_MARKS}
    while mark := next((mark for mark in marks if text.rstrip().endswith(mark)), None):
        text = text.rstrip().removesuffix(mark).rstrip()
    return text


def _escape(text: str, controls: Sequence[str]) -> str:
    """The text with a blank inside every string that the model reads as a control token."""
    for mark in controls:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def _escape_parts(parts: Sequence[str | Picture], controls: Sequence[str]) -> list[str | Picture]:
    """The parts of a message, escaped also where a template joins texts beside each other."""
    found: list[str | Picture] = []
    for is_text, run in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            found += run
            continue
        texts = [_escape(str(text), controls) for text in run]
        joined = "".join(texts)
        if any(mark in joined for mark in controls):
            texts[1:] = [f" {text}" for text in texts[1:]]
        found += texts
    return found


def _control_tokens(processor: Any) -> list[str]:
    """Strings that the model reads as control tokens, long ones first.

    Found once for each tokenizer: it takes milliseconds with the thousands of added tokens that
    Gemma 3 has. Tokens that are added later are not among them.
    """
    tokenizer, images = processor.tokenizer, tuple(image_marks(processor))
    known = _CONTROL_TOKENS.setdefault(tokenizer, {})
    if images not in known:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {
            *images,
            *tokenizer.all_special_tokens,
            *(token.content for token in added if token.special),
        }
        known[images] = sorted((mark for mark in marks if len(mark) > 1), key=len, reverse=True)
    return known[images]


_CONTROL_TOKENS: WeakKeyDictionary[Any, dict[tuple[str, ...], list[str]]] = WeakKeyDictionary()
"""By tokenizer and by the marks of images, which are the processor's."""


def image_marks(processor: Any) -> list[str]:
    """Tokens that may stand for an image in a prompt; Gemma's templates use one of their own."""
    names = ("image_token", "boi_token")
    return [mark for name in names if isinstance(mark := getattr(processor, name, None), str)]
