"""Whether this device, and what is installed for it, can do what a recipe asks for."""

import os
import shutil

from tita.errors import TitaError
from tita.recipes import TrainRecipe

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
