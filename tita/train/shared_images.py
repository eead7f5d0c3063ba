"""Runs the vision tower once per distinct image of a batch, whichever sequences show it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_ENCODED_ONCE = (
    *("aria", "aya_vision", "deepseek_vl", "deepseek_vl_hybrid", "ernie4_5_vl_moe", "exaone4_5"),
    *("gemma3", "gemma4", "glm4v", "idefics2", "idefics3", "internvl", "llava", "llava_next"),
    *("llava_onevision", "ovis2", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl", "smolvlm"),
    "video_llama_3",
)
"""Families whose image features depend only on the image and are one tensor or a list."""
_IMAGE_INPUTS = (
    "batch_num_images",
    "high_res_pixel_values",
    "image_grid_thw",
    "image_merge_sizes",
    "image_position_ids",
    "image_sizes",
    "pixel_attention_mask",
    "pixel_mask",
    "pixel_values",
)
_PART_COUNTS = {"pixel_values_local": "num_local_patches"}
"""Inputs with several rows per image, or none, and the input that has their numbers."""


class SharedImages:
    """The images that the sequences of the current batch share; one model's tower reads it."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self._tokens: list[int] = []

    def describe(self, *, first: Sequence[int], tokens: Sequence[int]) -> None:
        """Set what the next forward pass shows.

        Args:
            first: of each sequence, the number of the first sequence that shows its image.
            tokens: image tokens of each sequence.
        """
        self._first, self._tokens = list(first), list(tokens)

    def assume_pairs(self) -> None:
        """Set that the second half of the next batch shows the images of the first half."""
        self._first, self._tokens = [], []

    def select(self, value: torch.Tensor) -> torch.Tensor:
        """The parts of an image input `[N, ...]` that belong to distinct images."""
        if not self._first:
            return value[: len(value) // 2]
        return take_images(value, self._distinct, tokens=self._tokens)

    def expand(self, features: Any) -> Any:
        """The features of distinct images, repeated for every sequence that shows one."""
        if not self._first:
            # One tensor, or one per prompt.
            is_tensor = isinstance(features, torch.Tensor)
            return torch.cat([features, features]) if is_tensor else (*features, *features)
        distinct = self._distinct
        numbers = {sequence: number for number, sequence in enumerate(distinct)}
        order = [numbers[sequence] for sequence in self._first]
        if not isinstance(features, torch.Tensor):
            return tuple(features[number] for number in order)
        tokens = [self._tokens[sequence] for sequence in distinct]
        return take_images(features, order, tokens=tokens)

    @property
    def _distinct(self) -> list[int]:
        return sorted(set(self._first))


def take_inputs(
    inputs: Mapping[str, torch.Tensor], order: Sequence[int], *, tokens: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The processor's output for the prompts `order` of a batch, one image each.

    Args:
        inputs: of all prompts.
        order: numbers of prompts, which may repeat.
        tokens: image tokens of each prompt.
    """
    shape, found = inputs["input_ids"].shape, {}
    for name, value in inputs.items():
        if value.shape == shape:
            found[name] = value[list(order)]
        elif name in _PART_COUNTS:
            parts = torch.split(value, inputs[_PART_COUNTS[name]].tolist())
            found[name] = torch.cat([parts[number] for number in order])
        else:
            found[name] = take_images(value, order, tokens=tokens)
    return found


def take_images(
    value: torch.Tensor, order: Sequence[int], *, tokens: Sequence[int]
) -> torch.Tensor:
    """The parts of an image input `[N, ...]` that belong to the images `order`.

    Args:
        value: one row per image, or several (tiles or patches) in proportion to its tokens.
        order: numbers of images, which may repeat.
        tokens: image tokens of each image in `value`.
    """
    sizes = [1] * len(tokens)
    if len(value) != len(tokens):
        # Tiles of images in one row have equal numbers of tokens, and so do patches.
        sizes = [number * len(value) // sum(tokens) for number in tokens]
        if sum(sizes) != len(value):
            raise ValueError(f"cannot assign {len(value)} rows to images of {tokens} tokens")
    parts = torch.split(value, sizes)
    return torch.cat([parts[number] for number in order])


def encode_images_once(model: Any) -> SharedImages | None:
    """Make a model run its vision tower once per distinct image; None if it cannot.

    Until `SharedImages.describe` says otherwise, a batch contains every image twice, first for all
    chosen answers and then for all rejected ones. Families that were not verified are unchanged:
    some return features of several layers.
    """
    if model.config.model_type not in _ENCODED_ONCE:
        return None
    inner, shared = model.model, SharedImages()
    # transformers has no hook between the tower and the language model, so the instance's public
    # method is replaced.
    encode = inner.get_image_features
    names = tuple(inspect.signature(encode).parameters)

    def encode_once(*given: Any, **named: Any) -> Any:
        options = dict(zip(names, given, strict=False)) | named
        for name in _IMAGE_INPUTS:
            if (value := options.get(name)) is not None:
                options[name] = shared.select(value)
        features = encode(**options)
        features.pooler_output = shared.expand(features.pooler_output)
        return features

    inner.get_image_features = encode_once
    return shared
