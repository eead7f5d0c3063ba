"""From a conversation to model inputs: each model's own chat template, image tokens, processor.

The same `Prompt` goes to every model, and what one makes of it is another's only where both would
make the same. Words that people wrote stay words: whatever a model takes for a control token is
disarmed.

Legend: B prompts of a batch, L tokens of the longest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tita.errors import TitaError
from tita.vlm.images import Picture, pad_to_square

if TYPE_CHECKING:
    from tita.vlm.loading import VLM

Inputs = dict[str, Any]
"""What a processor makes of prompts: `input_ids[B, L]`, `attention_mask[B, L]`, image tensors."""


class BadConversation(TitaError):
    """The model's template cannot say this, or its image marks and images do not match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation; `parts` are words and images in the asker's order."""

    role: Literal["system", "user", "assistant"]
    parts: "tuple[str | Picture, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked, before any model's template: the same for base, reward and reference.

    In one of three ways: `text` and `images`; a whole conversation in `turns`; or `raw`, a prompt
    already in the model's template with `<image>` where each of `images` goes.
    """

    text: str = ""
    images: "tuple[Picture, ...]" = ()
    turns: tuple[Turn, ...] = ()
    raw: str | None = None

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """What is asked as turns; a question's images come before its words."""
        return self.turns or (Turn(role="user", parts=(*self.images, self.text)),)

    @property
    def pictures(self) -> "tuple[Picture, ...]":
        """All images, in order."""
        return tuple(
            part for turn in self.conversation for part in turn.parts if not isinstance(part, str)
        )


def prompt_text(processor: Any, prompt: Prompt, *, where: str = "model") -> str:
    """The prompt in the model's chat template, up to where its answer begins.

    Raises:
        BadConversation: the template knows no such turns, or takes no images there.
        TitaError: the processor has no chat template.
    """
    if prompt.raw is not None:
        return _raw_text(processor, prompt)
    if getattr(processor, "chat_template", None) is None:
        raise TitaError(
            "has no chat template", where=where, remedy="save chat_template.jinja beside the model"
        )
    messages = [_message(processor, turn) for turn in prompt.conversation]
    try:
        text: str = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        # Templates raise where a model knows no such role or order of turns.
        raise BadConversation(
            f"the model's chat template takes no such conversation ({error})"
        ) from None
    marks = _image_marks(processor)
    if marks and len(prompt.pictures) not in [text.count(mark) for mark in marks]:
        raise BadConversation("the model's chat template takes no images here")
    return text


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether the tokenizer is to put its beginning-of-text token before a prompt.

    Some templates write it down (demo, Llama 3), others leave it to the tokenizer (LLaVA-1.5); the
    rule is that of transformers' `ProcessorMixin.apply_chat_template`.
    """
    begin = processor.tokenizer.bos_token
    return begin is None or not text.startswith(begin)


def prepare(vlm: "VLM", prompts: Sequence[Prompt]) -> Inputs:
    """Model inputs for a batch of prompts on the model's device, padded on the left.

    All prompts begin alike: in the model's template, or all `raw`. Images are open.

    Raises:
        BadConversation: a prompt cannot be said to this model.
        TitaError: the processor has no chat template.
    """
    images = [[_aspect(vlm, image) for image in prompt.pictures] for prompt in prompts]
    texts = [prompt_text(vlm.processor, prompt, where=vlm.name) for prompt in prompts]
    try:
        inputs = vlm.processor(
            text=texts,
            images=images if any(images) else None,
            add_special_tokens=adds_special_tokens(vlm.processor, texts[0]),
            padding=len(prompts) > 1,
            padding_side="left",
            return_tensors="pt",
        )
    except ValueError as error:
        # Some take no question without an image, others no image a hundred times as wide as high.
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise BadConversation(f"the model's processor refuses it ({reason})") from error
    inputs.pop("labels", None)  # PaliGemma's, for training
    return dict(inputs.to(vlm.device))


def prepare_each(vlm: "VLM", prompts: Sequence[Prompt]) -> list[Inputs]:
    """As `prepare`, row by row without padding, from as few calls as the model's tensors allow."""
    kinds = {(len(prompt.pictures), prompt.raw is None) for prompt in prompts}
    # Tensors of several images a prompt cannot be told apart; raw prompts may begin unlike.
    if len(prompts) > 1 and kinds in ({(0, True)}, {(1, True)}):
        together = prepare(vlm, prompts)
        if all(len(tensor) == len(prompts) for tensor in together.values()):
            return _rows(together)
    return [prepare(vlm, [prompt]) for prompt in prompts]


def prepare_alike(one: "VLM", other: "VLM") -> bool:
    """Whether both make the same inputs of every prompt, so that it need go through one only."""
    if (one.image_aspect, one.device) != (other.image_aspect, other.device):
        return False
    return one.processor is other.processor or _settings(one) == _settings(other)


def _settings(vlm: "VLM") -> list[Any]:
    """All that a processor goes by; a slow tokenizer, which does not tell its own, is like none."""
    processor, tokenizer = vlm.processor, vlm.tokenizer
    rules: Any = id(tokenizer)
    if tokenizer.is_fast:
        # Each call says how it pads and cuts; what is left here is the last one's.
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": 0, "truncation": 0}
    settings = (processor.to_json_string(), processor.chat_template, tokenizer.special_tokens_map)
    return [type(processor), *settings, rules]


def _rows(together: Inputs) -> list[Inputs]:
    shape = together["input_ids"].shape
    lengths = together["attention_mask"].sum(-1).tolist()
    return [
        {
            name: tensor[n : n + 1, -length:] if tensor.shape == shape else tensor[n : n + 1]
            for name, tensor in together.items()
        }
        for n, length in enumerate(lengths)
    ]


def _message(processor: Any, turn: Turn) -> dict[str, Any]:
    """A turn in transformers' chat format."""
    content = [
        {"type": "text", "text": _disarmed(processor, part)}
        if isinstance(part, str)
        else {"type": "image"}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def _raw_text(processor: Any, prompt: Prompt) -> str:
    assert prompt.raw is not None
    marks = prompt.raw.count("<image>")
    if marks != len(prompt.pictures):
        raise BadConversation(
            f"number of images ({len(prompt.pictures)}) does not match number of <image> tokens "
            f"in prompt ({marks})"
        )
    pieces = [_disarmed(processor, piece) for piece in prompt.raw.split("<image>")]
    return str(processor.image_token).join(pieces)


def _disarmed(processor: Any, text: str) -> str:
    """The asker's words with a blank inside whatever the model takes for a control token."""
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
    """What may stand for an image in a prompt; Gemma's templates write a token of their own."""
    names = ("image_token", "boi_token")
    return [mark for name in names if isinstance(mark := getattr(processor, name, None), str)]


def _aspect(vlm: "VLM", image: Picture) -> Any:
    from pathlib import Path

    assert not isinstance(image, Path), "images are opened before they are prepared"
    return pad_to_square(image) if vlm.image_aspect == "pad" else image
