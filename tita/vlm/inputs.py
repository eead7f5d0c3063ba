"""Model inputs: prompts through a model's processor, and the positions of their tokens.

Legend: B prompts of a batch, L tokens of the longest.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tita.errors import TitaError
from tita.vlm.images import Picture, pad_to_square
from tita.vlm.loading import VLM
from tita.vlm.processors import resize_first
from tita.vlm.prompts import (
    BadConversation,
    Prompt,
    adds_special_tokens,
    check_token_ids,
    prompt_text,
)

Inputs = dict[str, Any]
"""Output of a processor: `input_ids[B, L]`, `attention_mask[B, L]`, image tensors."""

_WITHOUT_CONVERSION = ("aria", "deepseek_vl_hybrid", "kimi_k25")
"""Models that do not convert pixels to the dtype of their weights."""


def prepare(vlm: VLM, prompts: Sequence[Prompt]) -> Inputs:
    """Model inputs for a batch of prompts on the model's device, padded on the left.

    All prompts begin alike: in the model's template, or all `raw`; `token_ids` come alone. Images
    are open.

    Raises:
        BadConversation: the model does not accept a prompt; `EmptyPrompt` if it has no tokens.
        TitaError: the processor has no chat template, or its tokenizer knows tokens that the model
            does not.
    """
    if token_ids := prompts[0].token_ids:
        assert len(prompts) == 1
        check_token_ids(vlm.processor, token_ids)
        ids = torch.tensor([token_ids])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _check_tokens(vlm, given)
        return {name: each.to(vlm.device) for name, each in given.items()}
    images = [[_in_aspect(vlm, image) for image in prompt.pictures] for prompt in prompts]
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
        # Some processors need an image, others refuse one a hundred times as wide as high.
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise BadConversation(f"the model's processor refuses it ({reason})") from error
    inputs.pop("labels", None)  # PaliGemma's, for training
    _check_tokens(vlm, inputs)
    has_dtype = vlm.model.config.model_type in _WITHOUT_CONVERSION
    return dict(inputs.to(vlm.device, **({"dtype": vlm.model.dtype} if has_dtype else {})))


class EmptyPrompt(BadConversation):
    """The prompt has no tokens, so nothing can follow it."""


def prepare_each(vlm: VLM, prompts: Sequence[Prompt]) -> list[Inputs]:
    """As `prepare`, but one unpadded row per prompt, with as few processor calls as possible."""
    kinds = {
        (len(prompt.pictures), prompt.raw is None and not prompt.token_ids) for prompt in prompts
    }
    # Image tensors of several images per prompt cannot be split; raw prompts may begin differently,
    # and token ids are not padded.
    if len(prompts) > 1 and kinds in ({(0, True)}, {(1, True)}):
        batch = prepare(vlm, prompts)
        # With a number of parts per image (Step 3.7), one may have two and another none.
        has_parts = any(name.startswith("num_") for name in batch)
        if not has_parts and all(len(tensor) == len(prompts) for tensor in batch.values()):
            return _split(batch)
    return [prepare(vlm, [prompt]) for prompt in prompts]


def prepare_alike(one: VLM, other: VLM) -> bool:
    """Whether both models make the same inputs of every prompt, so that one call serves both."""
    if (one.image_aspect, one.device) != (other.image_aspect, other.device):
        return False
    return one.processor is other.processor or _settings(one) == _settings(other)


def prompt_positions(vlm: VLM, inputs: Inputs) -> tuple[Tensor, int]:
    """Positions of the tokens of one unpadded prompt.

    Qwen2-VL and related models give an image token three positions: time, height, width (M-RoPE,
    arXiv 2409.12191). The position of a token after an image is then less than its index.

    Returns:
        positions[A, L] on A axes, and the difference of position and index of later tokens.
    """
    ids = inputs["input_ids"]
    index = getattr(getattr(vlm.model, "model", None), "get_rope_index", None)
    if index is None or not any(name.endswith("_grid_thw") for name in inputs):
        return torch.arange(ids.shape[1], device=ids.device).unsqueeze(0), 0
    known = inspect.signature(index).parameters
    positions, offsets = index(**{name: each for name, each in inputs.items() if name in known})
    return positions[:, 0], int(offsets.flatten()[0])


def _check_tokens(vlm: VLM, inputs: Inputs) -> None:
    """Refuse what the model would fail on: no tokens, or ids beyond its embeddings.

    Args:
        vlm: the model.
        inputs: for it, on the host.
    """
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    if not ids.size or not mask.any(-1).all():
        raise EmptyPrompt("the prompt is empty: it has no tokens", remedy="write some text")
    num_known = vlm.model.get_input_embeddings().weight.shape[0]
    if ids.max() < num_known:
        return
    # The token of an image is replaced by the image before it is looked up.
    unknown = ids[(ids >= num_known) & (ids != image_token_id(vlm.model))]
    if unknown.size:
        raise TitaError(
            f"its tokenizer gives token {int(unknown[0])}, and the model knows {num_known} tokens",
            where=vlm.name,
            remedy="save the tokenizer that the model was trained with",
        )


def image_token_id(model: Any) -> int | None:
    """The token that stands for images in a model's prompts."""
    return _image_token_id(model.config)


def _image_token_id(config: Any) -> int | None:
    names = ("image_token_id", "image_token_index")
    return next((int(at) for name in names if (at := getattr(config, name, None))), None)


def check_image_token(config: Any, *, where: str) -> None:
    """Check that a model's configuration names the token that stands for images.

    Args:
        config: of the model.
        where: its name in errors.

    Raises:
        TitaError: it does not.
    """
    if _image_token_id(config) is None:
        raise TitaError(
            f"does not say which token stands for an image ({config.model_type})",
            where=where,
            remedy="name it as `image_token_id` in config.json if the model has one; otherwise "
            "choose another model",
        )


def image_token_ids(model: Any) -> frozenset[int]:
    """All tokens whose embeddings depend on the images of a prompt: the model reads them together.

    Ovis2 replaces the tokens around an image, too, if it gets the image with them.
    """
    token, around = image_token_id(model), getattr(model.config, "visual_indicator_token_ids", None)
    return frozenset(() if token is None else (token, *(around or ())))


def _settings(vlm: VLM) -> list[Any]:
    """All settings of a processor; a slow tokenizer hides its rules, and equals no other."""
    processor, tokenizer = vlm.processor, vlm.tokenizer
    rules: Any = id(tokenizer)
    if tokenizer.is_fast:
        # Padding and truncation are set by each call and do not matter here.
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": 0, "truncation": 0}
    settings = (processor.to_json_string(), processor.chat_template, tokenizer.special_tokens_map)
    return [type(processor), *settings, rules]


def _split(batch: Inputs) -> list[Inputs]:
    shape = batch["input_ids"].shape
    lengths = batch["attention_mask"].sum(-1).tolist()
    return [
        {
            name: tensor[n : n + 1, -length:] if tensor.shape == shape else tensor[n : n + 1]
            for name, tensor in batch.items()
        }
        for n, length in enumerate(lengths)
    ]


def _in_aspect(vlm: VLM, image: Picture) -> Any:
    assert not isinstance(image, Path), "images are opened before they are prepared"
    shown = pad_to_square(image) if vlm.image_aspect == "pad" else image
    return resize_first(vlm.processor, shown)
