"""From a prepared request to vLLM's input: token ids, image tensors, and the places of images.

The processors run here, once, for both engines alike; vLLM's own are not used. So both engines read
the same tokens and the same pixels.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.inputs import EngineInput, mm_input, tokens_input
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from tita.align.prompts import PreparedRequest
from tita.align.vocabulary import Vocabulary
from tita.errors import TitaError
from tita.vllm_plugin.families import STEERING_MARK, Family
from tita.vlm.inputs import Inputs
from tita.vlm.prompts import BadConversation


class DifferentPrompts(TitaError):
    """Base and reward model would read different tokens, which one vLLM model cannot."""


def to_engine_input(
    prepared: PreparedRequest,
    *,
    family: Family,
    image_token: int | None,
    vocabularies: Mapping[str, Vocabulary],
    adapters: Sequence[str] = (),
) -> EngineInput:
    """vLLM's input of a request.

    Args:
        prepared: the request and its inputs for each model.
        family: of all models.
        image_token: the base's token that stands for images.
        vocabularies: the maps of models whose tokens differ from the base's.
        adapters: roles of LoRA adapters, which all read the same; the first is that of their model.

    Raises:
        DifferentPrompts: the models' prompts differ.
        BadConversation: images are next to each other, and it is not known where one ends.
    """
    base = prepared.inputs["base"]
    ids: list[int] = base["input_ids"][0].tolist()
    others = {role: each for role, each in prepared.inputs.items() if role != "base"}
    for role, inputs in others.items():
        _check_alike(role, ids, inputs, image_token, vocabularies.get(role))
    tensors = _tensors(base, family)
    if not tensors:
        return tokens_input(ids)
    for role, inputs in others.items():
        if inputs is not base and _differ(base, inputs, family):
            own = _tensors(inputs, family).items()
            model = adapters[0] if role in adapters else role
            tensors |= {f"{model}{STEERING_MARK}{name}": each for name, each in own}
    if family.num_tiles:
        tensors |= _tile_tensors(ids, family, image_token, tensors["pixel_values"])
    items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(tensors), _fields(tensors, family))
    number = len(items["image"])
    sizes = base["image_sizes"] if family.tokens_by_size else None
    # With its prompt's images, and by what each model sees of them: features are cached by it.
    digest = "-".join(dict.fromkeys(prepared.image_digests.values()))
    return mm_input(
        ids,
        items,
        {"image": [f"{digest}-{n}" for n in range(number)]},
        {"image": _places(ids, image_token, number, sizes=sizes)},
    )


def _tensors(inputs: Inputs, family: Family) -> dict[str, Tensor]:
    return {name: inputs[name] for name in family.tensors if name in inputs}


def _differ(one: Inputs, other: Inputs, family: Family) -> bool:
    ours, theirs = _tensors(one, family), _tensors(other, family)
    return any(not torch.equal(ours[name], theirs[name]) for name in ours)


def _fields(tensors: dict[str, Tensor], family: Family) -> dict[str, MultiModalFieldConfig]:
    fields: dict[str, Any] = {}
    for name in tensors:
        role, mark, own = name.rpartition(STEERING_MARK)
        split = family.tensors.get(own)
        if split == "patches":
            sizes = tensors[f"{role}{mark}image_grid_thw"].prod(-1)
            fields[name] = MultiModalFieldConfig.flat_from_sizes("image", sizes)
        elif split == "tiles":
            # All models read the same tokens, so their images have the same tiles.
            sizes = tensors[family.num_tiles]
            fields[name] = MultiModalFieldConfig.flat_from_sizes("image", sizes)
        elif own == family.image_token:
            number = len(tensors[family.num_tiles])
            fields[name] = MultiModalFieldConfig.shared("image", number)
        else:
            # Sizes are read on the CPU; pixels go to the device.
            small = not tensors[name].is_floating_point()
            fields[name] = MultiModalFieldConfig.batched("image", keep_on_cpu=small)
    return fields


def _tile_tensors(
    ids: list[int], family: Family, image_token: int | None, pixels: Tensor
) -> dict[str, Tensor]:
    """The number of tiles of each image, by its tokens: every tile has the same number of them."""
    lengths = [len(list(run)) for token, run in groupby(ids) if token == image_token]
    per_tile = sum(lengths) // len(pixels)
    return {
        family.num_tiles: torch.tensor([length // per_tile for length in lengths]),
        family.image_token: torch.tensor(image_token),
    }


def _places(
    ids: list[int], image_token: int | None, number: int, *, sizes: Tensor | None
) -> list[PlaceholderRange]:
    """Where each image's tokens are: runs of the image token, one per image.

    Args:
        ids: of the prompt.
        image_token: the token.
        number: of images.
        sizes: [number, 2] of the images, if their numbers of tokens depend on them.

    Raises:
        BadConversation: images are next to each other, and it is not known where one ends.
    """
    at = [place for place, token in enumerate(ids) if token == image_token]
    starts = at[:1] + [after for before, after in pairwise(at) if after > before + 1]
    if len(starts) != number:
        # vLLM ends if a place has another length than the features of its image.
        alike = sizes is None or bool((sizes == sizes[0]).all())
        if len(at) % number or len(starts) != 1 or not alike:
            raise BadConversation(
                f"{number} images in {len(starts)} places", remedy="put text between images"
            )
        # Images beside each other have the same number of tokens each.
        starts = at[:: len(at) // number]
    ends = [*(at.index(start) for start in starts[1:]), len(at)]
    counts = [end - at.index(start) for start, end in zip(starts, ends, strict=True)]
    return [
        PlaceholderRange(offset=start, length=count)
        for start, count in zip(starts, counts, strict=True)
    ]


def _check_alike(
    role: str,
    ids: list[int],
    inputs: Inputs,
    image_token: int | None,
    vocabulary: Vocabulary | None,
) -> None:
    """Refuse prompts that differ between the models, naming the first difference."""
    read = ids if vocabulary is None else [vocabulary.reads[token] for token in ids]
    theirs: list[int] = inputs["input_ids"][0].tolist()
    if read == theirs:
        return
    mark = image_token if vocabulary is None else _read(vocabulary, image_token)
    ours_images, their_images = ids.count(_or(image_token)), theirs.count(_or(mark))
    remedy = "choose --engine transformers, which reads different prompts"
    if ours_images != their_images:
        raise DifferentPrompts(
            f"the {role} model has {their_images} image tokens, the base model {ours_images}",
            remedy=remedy,
        )
    pairs = zip(read, theirs, strict=False)
    at = next(
        (n for n, (one, other) in enumerate(pairs) if one != other), min(len(read), len(theirs))
    )
    raise DifferentPrompts(
        f"the {role} model's prompt differs from the base model's at token {at} "
        f"({len(theirs)} and {len(ids)} tokens): their chat templates or tokenizers differ",
        remedy=remedy,
    )


def _read(vocabulary: Vocabulary, token: int | None) -> int | None:
    return None if token is None else vocabulary.reads[token]


def _or(token: int | None) -> int:
    return -1 if token is None else token
