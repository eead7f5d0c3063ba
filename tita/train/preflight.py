"""What is looked at before any weights are loaded: each fault costs seconds here, hours later."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tita.errors import TitaError
from tita.gang import free_memory_bytes
from tita.recipes import TrainRecipe
from tita.storage import Store
from tita.terminal import counted, progress, say
from tita.train.dataset import Inputs, lengths, make_answers, make_dataset, token_ids
from tita.train.group import gathered, local_world_size, together
from tita.train.memory import Gang, Needs, lighter, measure, needs
from tita.train.model import shape_of

T = TypeVar("T")
_WHERE = "recipe of train-dpo"
_GIB = 1024**3


def preflight(
    recipe: TrainRecipe, *, inputs: Inputs, processor: Any, folder: Path, store: Store
) -> Inputs:
    """Look whether this run can succeed; every rank calls this and does its part.

    Returns:
        The inputs, without what `too_long: drop` leaves out.

    Raises:
        TitaError: it cannot, and why.
    """
    import torch.distributed as dist

    together(lambda: check_device(recipe))
    together(lambda: check_vocabulary(processor, inputs=inputs, where=recipe.model))
    found = _lengths_of(recipe, inputs=inputs, processor=processor)
    kept, longest = together(lambda: _fitting(recipe, inputs=inputs, lengths=found))
    together(lambda: check_batches(recipe, num_pairs=len(kept.pairs), world=dist.get_world_size()))
    gang = Gang(world=dist.get_world_size(), local=local_world_size())
    on_gpu, free = free_memory()
    taken = together(
        lambda: check_memory(
            recipe, start=inputs.model, gang=gang, tokens=longest, free=free, on_gpu=on_gpu
        )
    )
    together(lambda: check_disk(folder, needed=taken.scratch))
    if "://" not in store.uri:
        together(lambda: check_disk(Path(store.uri), needed=taken.scratch))
    if dist.get_rank() == 0:
        say(_summary(recipe, kept=kept, longest=longest, gang=gang, found=taken, free=free))
    return kept


def _summary(
    recipe: TrainRecipe, *, kept: Inputs, longest: int, gang: Gang, found: Needs, free: int
) -> str:
    batch = recipe.batch_size * recipe.gradient_accumulation * gang.world
    return (
        f"train-dpo: {len(kept.pairs):,} pairs, {batch} a step ({recipe.batch_size} x "
        f"{recipe.gradient_accumulation} accumulated x {gang.world} processes), the longest "
        f"{longest} of {recipe.max_length} tokens; about {found.device / _GIB:.1f} of "
        f"{free / _GIB:.1f} GiB a process"
    )


def check_vocabulary(processor: Any, *, inputs: Inputs, where: str) -> None:
    """Look that model, tokenizer and chat template fit one another.

    Raises:
        TitaError: no image processor or end-of-text, a tokenizer with more tokens than the model,
            a template that leaves the image out, or a processor that makes labels.
    """
    from transformers import AutoConfig

    from tita.vlm import telling_load_errors

    if getattr(processor, "image_processor", None) is None:
        raise TitaError(
            "has no image processor", where=where, remedy="save its processor beside it"
        )
    if "labels" in processor.model_input_names:
        # PaliGemma's do; TRL's DPO hands them on to the model beside its own.
        raise TitaError(
            "its processor makes labels of its own, which DPO cannot use",
            where=where,
            remedy="train a reward model of another family",
        )
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise TitaError(
            "its tokenizer has no end-of-text token", where=where, remedy="set eos_token in it"
        )
    with telling_load_errors(where):
        config = AutoConfig.from_pretrained(inputs.model)
    known, highest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if highest >= known:
        raise TitaError(
            f"its tokenizer knows token {highest}, the model only {known} tokens",
            where=where,
            remedy="save the tokenizer that belongs to the model beside it",
        )
    row = make_dataset(
        inputs.pairs[:1],
        images=inputs.images,
        processor=processor,
        image_aspect=inputs.image_aspect,
    )[0]
    image = getattr(config, "image_token_id", None)
    if image is not None and image not in token_ids(row, processor=processor):
        raise TitaError(
            "its chat template leaves the image out",
            where=where,
            remedy="save the chat template that belongs to the model",
        )


def _lengths_of(
    recipe: TrainRecipe, *, inputs: Inputs, processor: Any
) -> tuple[list[int], list[int]]:
    """Tokens of every pair and of every answer of the warm-up; ranks share the work."""
    options: dict[str, Any] = {
        "images": inputs.images,
        "processor": processor,
        "image_aspect": inputs.image_aspect,
    }
    pairs = _lengths(make_dataset(inputs.pairs, **options), processor=processor)
    if recipe.sft is None or recipe.sft.answers is None:
        return pairs, pairs[: len(inputs.answers)]
    return pairs, _lengths(make_answers(inputs.answers, **options), processor=processor)


def _fitting(
    recipe: TrainRecipe, *, inputs: Inputs, lengths: tuple[list[int], list[int]]
) -> tuple[Inputs, int]:
    """The inputs that are not too long, and the tokens of the longest of them."""
    pairs, answers = lengths
    kept = replace(
        inputs,
        pairs=keep(inputs.pairs, lengths=pairs, recipe=recipe),
        answers=keep(inputs.answers, lengths=answers, recipe=recipe),
    )
    return kept, max(n for n in (*pairs, *answers) if n <= recipe.max_length)


def _lengths(rows: Any, *, processor: Any) -> list[int]:
    """Tokens of every row; each rank opens and tokenizes its share."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    mine = rows.select(range(rank, len(rows), world))

    def work() -> list[int]:
        found = []
        with progress("looking at the pairs", total=len(mine), unit="pairs") as advance:
            for length in lengths(mine, processor=processor):
                found.append(length)
                if rank == 0:
                    advance()
        return found

    shares = gathered(work)
    return [shares[i % world][i // world] for i in range(len(rows))]


def keep(items: Sequence[T], *, lengths: Sequence[int], recipe: TrainRecipe) -> tuple[T, ...]:
    """Those of `items` that are not longer than the recipe's `max_length`.

    Raises:
        TitaError: some are and the recipe says to refuse them, or nothing is left.
    """
    kept = tuple(item for item, n in zip(items, lengths, strict=True) if n <= recipe.max_length)
    num_long = len(items) - len(kept)
    if num_long and (recipe.too_long == "refuse" or not kept):
        raise TitaError(
            f"{num_long} of {len(items)} pairs are too long: the longest has {max(lengths)} "
            f"tokens with its image, max_length is {recipe.max_length}",
            where=_WHERE,
            remedy=f"--set max_length={max(lengths)}, or --set too_long=drop",
        )
    if num_long and int(os.environ.get("RANK", "0")) == 0:
        say(f"train-dpo: {num_long} of {len(items)} pairs are above max_length and left out")
    return kept


def check_batches(recipe: TrainRecipe, *, num_pairs: int, world: int) -> None:
    """Look that there is at least one whole batch: else pairs would be repeated to fill it.

    Raises:
        TitaError: there is not.
    """
    batch = recipe.batch_size * recipe.gradient_accumulation * world
    if num_pairs >= batch:
        return
    fitting = num_pairs // world
    raise TitaError(
        f"{counted(num_pairs, 'pair')} {'is' if num_pairs == 1 else 'are'} less than one batch of "
        f"{batch} ({recipe.batch_size} x "
        f"{recipe.gradient_accumulation} accumulated x {world} processes)",
        where=_WHERE,
        remedy=f"--set batch_size={fitting} --set gradient_accumulation=1"
        if fitting
        else "use fewer processes or more pairs",
    )


def check_memory(
    recipe: TrainRecipe, *, start: str, gang: Gang, tokens: int, free: int, on_gpu: bool
) -> Needs:
    """Estimate what one process needs, and compare it with the `free` bytes of its device.

    Raises:
        TitaError: it cannot fit; says which setting would make it fit.
    """

    def lack_of(other: TrainRecipe) -> tuple[str | None, Needs]:
        shape = measure(shape_of(other, start=start))
        found = needs(other, shape=shape, gang=gang, tokens=tokens)
        return _lack(found, gang=gang, free=free, on_gpu=on_gpu), found

    lack, found = lack_of(recipe)
    if lack is None:
        return found
    fitting = (words for words, other in lighter(recipe) if lack_of(other)[0] is None)
    remedy = next(fitting, "use more or larger GPUs, or a smaller model")
    raise TitaError(lack, where=_WHERE, remedy=remedy)


def _lack(found: Needs, *, gang: Gang, free: int, on_gpu: bool) -> str | None:
    """In words, what is too much; None if it fits."""
    # Weights are read by the CPU and go to the device from there; ranks map the same files.
    node = found.host + found.weights
    if on_gpu and node > free_memory_bytes():
        return (
            f"needs about {node / _GIB:.1f} GiB of this node's own memory to load and offload, "
            f"and {free_memory_bytes() / _GIB:.1f} are free"
        )
    # Without a GPU there is nothing to offload from: all of it is this node's memory.
    certain = found.certain if on_gpu else found.certain + found.host // gang.local
    if certain <= free:
        return None
    device = found.device + certain - found.certain
    return (
        f"needs about {device / _GIB:.1f} GiB a process (weights {found.weights / _GIB:.1f}, "
        f"gradients and Adam {found.states / _GIB:.1f}, activations "
        f"{found.activations / _GIB:.1f}, offloaded {found.host / _GIB:.1f} a node), and "
        f"{free / _GIB:.1f} are free on its {'GPU' if on_gpu else 'share of this node'}"
    )


def free_memory() -> tuple[bool, int]:
    """Whether this process has a GPU, and the bytes free on it, else its share of the node's."""
    import torch

    if torch.cuda.is_available():
        return True, int(torch.cuda.mem_get_info()[0])
    return False, free_memory_bytes() // local_world_size()


def check_disk(folder: Path, *, needed: int) -> None:
    """Look that there is room for `needed` bytes of checkpoints.

    Raises:
        TitaError: there is not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TitaError(
            f"{free / _GIB:.1f} GiB are free, checkpoints and the model need about "
            f"{needed / _GIB:.1f}",
            where=str(folder),
            remedy="make room, or name larger disks in TITA_SCRATCH_DIR and TITA_STORE",
        )


_WHERE = "recipe of train-dpo"
_AMPERE = 8, 0
"""The compute capability from which on NVIDIA's GPUs know bfloat16, and flash-attn runs."""


def check_device(recipe: TrainRecipe) -> None:
    """Look that this process's device can compute what the recipe says.

    Raises:
        TitaError: it cannot.
    """
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    check_precision(recipe, capability=capability)
    check_attention(recipe, capability=capability)
    if capability is not None:
        check_compiler()


def check_precision(recipe: TrainRecipe, *, capability: tuple[int, int] | None) -> None:
    """Look that a GPU of this compute capability, or a CPU (None), knows the recipe's `dtype`.

    PyTorch would emulate bfloat16 on older GPUs; the kernels that TRL has compiled for it do not.

    Raises:
        TitaError: it does not.
    """
    if recipe.dtype == "bfloat16" and capability is not None and capability < _AMPERE:
        raise TitaError(
            f"this GPU knows no bfloat16 (compute capability {capability[0]}.{capability[1]})",
            where=_WHERE,
            remedy="--set dtype=float16",
        )
    if recipe.dtype == "float16" and capability is None:
        raise TitaError(
            "float16 is for GPUs, and there is none", where=_WHERE, remedy="--set dtype=float32"
        )


def check_attention(recipe: TrainRecipe, *, capability: tuple[int, int] | None) -> None:
    """Look that what computes attention is installed, and runs there with these numbers.

    Raises:
        TitaError: it is not, or does not.
    """
    from transformers.utils import is_flash_attn_2_available

    if recipe.attention != "flash_attention_2":
        return
    fault = None
    if not is_flash_attn_2_available():
        fault = "flash-attn is not installed, or there is no GPU for it"
    elif capability is not None and capability < _AMPERE:
        fault = "flash-attn does not run on GPUs older than Ampere"
    elif recipe.dtype == "float32":
        fault = "flash-attn does not compute in float32"
    if fault:
        raise TitaError(fault, where=_WHERE, remedy="--set attention=sdpa")


def check_compiler() -> None:
    """Look that Triton finds the C compiler that it makes its way to a GPU's driver with.

    TRL's log-probabilities are computed by Triton's kernels; `triton.runtime.build` looks here.

    Raises:
        TitaError: it does not.
    """
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return
    raise TitaError(
        "no C compiler, which Triton needs on GPUs",
        where=os.environ.get("PATH", "PATH"),
        remedy="install gcc with the C library's headers, or name one in CC",
    )
