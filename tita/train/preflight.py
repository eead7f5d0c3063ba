"""Checks before any weights are loaded, so that a mistake costs seconds and not hours.

Each check raises a `TitaError` that says what does not fit and what to change.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from tita.align.kv_cache import check_cacheable
from tita.data.image_table import ImageSource
from tita.data.shortcuts import measure_shortcuts
from tita.errors import TitaError
from tita.gang import free_memory_bytes
from tita.recipes import TrainRecipe
from tita.settings import settings
from tita.storage.locate import tree_version
from tita.terminal import counted, say
from tita.train.group import gather, local_world_size, on_all_ranks
from tita.train.measures import measure_rows, to_fields
from tita.train.memory import (
    MemoryEstimate,
    WorldSize,
    cheaper_recipes,
    estimate_memory,
    model_shape,
)
from tita.train.model import meta_model
from tita.train.run import TrainRun
from tita.train.selection import select
from tita.train.training_data import (
    RowFormatter,
    TrainInputs,
    input_places,
    prompt_token_ids,
    rows_digests,
    start_model_digest,
)
from tita.vlm.inputs import check_image_token
from tita.vlm.loading import translate_load_errors

_recipe_error = partial(TitaError, where="recipe of train-dpo")
_GIB = 1024**3
_AMPERE = 8, 0
"""The minimum compute capability of NVIDIA GPUs for bfloat16 and flash-attn."""


def preflight(run: TrainRun, *, inputs: TrainInputs, processor: Any) -> TrainInputs:
    """Check that the run can succeed; every rank calls this and does its share.

    Returns:
        The inputs with the images' digests, without the pairs that `too_long: drop` removes.
    """
    recipe = run.recipe

    def check_setup() -> None:
        check_device(recipe)
        check_processor(processor, inputs=inputs, where=recipe.model)

    on_all_ranks(check_setup)
    found = gather(lambda: _read_versions(inputs, recipe=recipe))
    on_all_ranks(lambda: check_equal_versions(found, places=input_places(recipe)))
    kept, longest = _check_data(run, inputs=inputs, processor=processor)
    world = WorldSize(total=dist.get_world_size(), local=local_world_size())
    on_gpu, free = free_memory()

    def check_resources() -> MemoryEstimate:
        check_batches(recipe, num_pairs=len(kept.pairs), world=world.total)
        estimate = check_memory(
            recipe, start=inputs.model, world=world, tokens=longest, free=free, on_gpu=on_gpu
        )
        check_disk(run.folder, needed=estimate.scratch, volume_gib=settings().scratch_volume_gib)
        if "://" not in run.store.uri:
            check_disk(Path(run.store.uri), needed=estimate.scratch)
        return estimate

    estimate = on_all_ranks(check_resources)
    if dist.get_rank() == 0:
        say(
            f"train-dpo: {len(kept.pairs):,} pairs, {_batch_size(recipe, world.total)}, longest "
            f"{longest} of {recipe.max_length} tokens; about {estimate.device / _GIB:.1f} of "
            f"{free / _GIB:.1f} GiB per process"
        )
        if (shortcuts := measure_shortcuts(kept.pairs)) is not None:
            shortcuts.report(balanced=recipe.balance is not None)
        kept = replace(kept, shortcuts=shortcuts)
    return kept


def _read_versions(inputs: TrainInputs, *, recipe: TrainRecipe) -> dict[str, str | None]:
    """What tells versions of the inputs apart, by the recipe's names; reads no image or weight."""
    assert isinstance(inputs.images, ImageSource)
    folder, model = inputs.images.folder, Path(inputs.model).absolute()
    return {
        **rows_digests(inputs, recipe=recipe),
        # None for files that are in no tree.
        "images": tree_version(folder) if inputs.images.has_files else None,
        "model": tree_version(model) if model.is_dir() else start_model_digest(inputs.model),
    }


def check_equal_versions(
    found: Sequence[Mapping[str, str | None]], *, places: Mapping[str, str]
) -> None:
    """Check that all ranks have read the same version of each input; each node reads its own.

    Args:
        found: versions by the recipe's names, of each rank.
        places: where the inputs are, by the same names.
    """
    for rank, versions in enumerate(found):
        for name, version in versions.items():
            if version != found[0][name]:
                raise TitaError(
                    f"rank {rank} has read another version of {name} than rank 0",
                    where=places[name],
                    remedy="start again if it was being replaced, or make the files of all nodes "
                    "equal",
                )


def _batch_size(recipe: TrainRecipe, world: int) -> str:
    batch = recipe.batch_size * recipe.gradient_accumulation * world
    return (
        f"{batch} per step ({recipe.batch_size} x {recipe.gradient_accumulation} accumulated x "
        f"{world} processes)"
    )


def check_device(recipe: TrainRecipe) -> None:
    """Check that this process's device supports the recipe."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    check_precision(recipe, capability=capability)
    check_attention(recipe, capability=capability)
    check_quantization(recipe, capability=capability)
    if capability is not None:
        check_compiler()


def check_precision(recipe: TrainRecipe, *, capability: tuple[int, int] | None) -> None:
    """Check that a GPU of this compute capability, or a CPU (None), supports the recipe's `dtype`.

    PyTorch emulates bfloat16 on older GPUs; the kernels that TRL compiles do not.
    """
    if recipe.dtype == "bfloat16" and capability is not None and capability < _AMPERE:
        found = ".".join(map(str, capability))
        raise _recipe_error(
            f"this GPU has no bfloat16 (compute capability {found})", remedy="--set dtype=float16"
        )
    if recipe.dtype == "float16" and capability is None:
        raise _recipe_error("float16 needs a GPU, and there is none", remedy="--set dtype=float32")


def check_attention(recipe: TrainRecipe, *, capability: tuple[int, int] | None) -> None:
    """Check that the recipe's attention is installed and supports this device and `dtype`."""
    if recipe.attention != "flash_attention_2":
        return
    fault = None
    if not is_flash_attn_2_available():
        fault = "flash-attn is not installed, or there is no GPU for it"
    elif capability is not None and capability < _AMPERE:
        fault = "flash-attn does not support GPUs older than Ampere"
    elif recipe.dtype == "float32":
        fault = "flash-attn does not support float32"
    if fault:
        raise _recipe_error(fault, remedy="--set attention=sdpa")


def check_quantization(recipe: TrainRecipe, *, capability: tuple[int, int] | None) -> None:
    """Check that this device and the installed packages support the recipe's `quantization`."""
    if recipe.quantization is None:
        return
    if capability is None:
        raise _recipe_error(
            f"quantization={recipe.quantization} needs a GPU with CUDA, and there is none",
            remedy="--set quantization=null",
        )
    if not is_bitsandbytes_available():
        raise _recipe_error(
            f"quantization={recipe.quantization} needs bitsandbytes, which is not installed",
            remedy="install it, or --set quantization=null",
        )


def check_compiler() -> None:
    """Check that there is a C compiler, which Triton needs for TRL's kernels on GPUs.

    `triton.runtime.build` looks in the same places.
    """
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return
    raise TitaError(
        "no C compiler, which Triton needs on GPUs",
        where=os.environ.get("PATH", "PATH"),
        remedy="install gcc with the C library's headers, or set CC to a compiler",
    )


def check_processor(processor: Any, *, inputs: TrainInputs, where: str) -> None:
    """Check that model, processor, tokenizer and chat template match, and that engines run it."""
    model_error = partial(TitaError, where=where)
    if getattr(processor, "image_processor", None) is None:
        raise model_error("has no image processor", remedy="save its processor next to the model")
    if "labels" in processor.model_input_names:
        # For example PaliGemma's. TRL's DPO would pass them to the model.
        raise model_error(
            "its processor makes labels, which DPO cannot use",
            remedy="train a reward model of another family",
        )
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise model_error("its tokenizer has no end-of-text token", remedy="set its eos_token")
    with translate_load_errors(where):
        config = AutoConfig.from_pretrained(inputs.model)
    check_cacheable(config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].forward, where=where)
    check_image_token(config, where=where)
    size, highest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if highest >= size:
        raise model_error(
            f"its tokenizer has token {highest}, but the model has only {size} tokens",
            remedy="save the model's own tokenizer next to it",
        )
    rows = RowFormatter(images=inputs.images, processor=processor, image_aspect=inputs.image_aspect)
    image = getattr(config, "image_token_id", None)
    prompt = rows.format_row(to_fields(inputs.pairs[0]))
    if image is not None and image not in prompt_token_ids(prompt, processor=processor):
        raise model_error(
            "its chat template omits the image",
            remedy="save the model's own chat template next to it",
        )


def _check_data(run: TrainRun, *, inputs: TrainInputs, processor: Any) -> tuple[TrainInputs, int]:
    """The inputs that fit `max_length`, with the images' digests; and the longest one's tokens."""
    recipe = run.recipe
    # Without `sft.answers`, the answers are the chosen ones of the pairs.
    own_answers = recipe.sft is not None and recipe.sft.answers is not None
    assert isinstance(inputs.images, ImageSource)
    measured = measure_rows(
        (inputs.pairs, inputs.validation, inputs.answers if own_answers else ()),
        images=inputs.images,
        aspect=inputs.image_aspect,
        model=inputs.model,
        processor=processor,
        store=run.store,
    )
    pairs, held_out, answers = measured.lengths
    return on_all_ranks(
        lambda: select(
            replace(inputs, image_digests=measured.digests),
            pairs=pairs,
            held_out=held_out,
            answers=answers if own_answers else pairs[: len(inputs.answers)],
            recipe=recipe,
        )
    )


def check_batches(recipe: TrainRecipe, *, num_pairs: int, world: int) -> None:
    """Check that there is at least one full batch; otherwise pairs would be repeated to fill it."""
    if num_pairs >= recipe.batch_size * recipe.gradient_accumulation * world:
        return
    fitting = num_pairs // world
    raise _recipe_error(
        f"{counted(num_pairs, 'pair')} {'is' if num_pairs == 1 else 'are'} less than one batch: "
        f"{_batch_size(recipe, world)}",
        remedy=f"--set batch_size={fitting} --set gradient_accumulation=1"
        if fitting
        else "use fewer processes or more pairs",
    )


def check_memory(
    recipe: TrainRecipe, *, start: str, world: WorldSize, tokens: int, free: int, on_gpu: bool
) -> MemoryEstimate:
    """Estimate what one process needs, and compare it with the `free` bytes of its device.

    The error's remedy is the first change of the recipe that fits.
    """

    def compare(other: TrainRecipe) -> tuple[str | None, MemoryEstimate]:
        shape = model_shape(meta_model(other, start=start))
        found = estimate_memory(other, shape=shape, world=world, tokens=tokens)
        return _shortage(found, world=world, free=free, on_gpu=on_gpu), found

    shortage, estimate = compare(recipe)
    if shortage is None:
        return estimate
    fitting = (
        change
        for change, other in cheaper_recipes(recipe)
        if (on_gpu or other.quantization is None) and compare(other)[0] is None
    )
    remedy = next(fitting, "use more or larger GPUs, or a smaller model")
    raise _recipe_error(shortage, remedy=remedy)


def _shortage(found: MemoryEstimate, *, world: WorldSize, free: int, on_gpu: bool) -> str | None:
    """A message about missing memory; None if it suffices."""
    # The CPU reads the weights and moves them to the device; ranks map the same files.
    node = found.host + found.weights
    if on_gpu and node > free_memory_bytes():
        return (
            f"needs about {node / _GIB:.1f} GiB of this node's memory to load and offload, "
            f"and {free_memory_bytes() / _GIB:.1f} are free"
        )
    # Without a GPU there is nothing to offload from: everything is in this node's memory.
    certain = found.certain if on_gpu else found.certain + found.host // world.local
    if certain <= free:
        return None
    device = found.device + certain - found.certain
    return (
        f"needs about {device / _GIB:.1f} GiB per process (weights {found.weights / _GIB:.1f}, "
        f"gradients and Adam {found.states / _GIB:.1f}, activations "
        f"{found.activations / _GIB:.1f}, offloaded {found.host / _GIB:.1f} per node), and "
        f"{free / _GIB:.1f} are free on its {'GPU' if on_gpu else 'share of this node'}"
    )


def free_memory() -> tuple[bool, int]:
    """Whether this process has a GPU, and its free bytes; else its share of the node's memory."""
    if torch.cuda.is_available():
        return True, int(torch.cuda.mem_get_info()[0])
    return False, free_memory_bytes() // local_world_size()


def check_disk(folder: Path, *, needed: int, volume_gib: float | None = None) -> None:
    """Check that the disk has `needed` bytes for checkpoints, and so has its volume, if known."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    remedy = "free space, or set TITA_SCRATCH_DIR and TITA_STORE to larger disks"
    if volume_gib is not None and volume_gib * _GIB < free:
        # Its pod would be evicted while it writes a checkpoint, and again after each start.
        free, remedy = int(volume_gib * _GIB), "raise jobs.scratch.size in the release's values"
    if free < needed:
        raise TitaError(
            f"{free / _GIB:.1f} GiB are free, checkpoints and the model need about "
            f"{needed / _GIB:.1f}",
            where=str(folder),
            remedy=remedy,
        )
