"""Where each token of a prompt stands, for models that count in one direction or in three.

Qwen2-VL and its kin give a token of an image three positions: time, height, width (M-RoPE, arXiv
2409.12191). Tokens after an image then stand nearer than their number in the sequence.
"""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tita.vlm.loading import VLM


def prompt_positions(vlm: "VLM", inputs: dict[str, Any]) -> "tuple[Tensor, int]":
    """Positions of a prompt without padding.

    Args:
        vlm: the model.
        inputs: what its processor made of one prompt, `input_ids[1, L]` among it.

    Returns:
        positions[A, L] for A directions, and what is to be added to the number of a later token.
    """
    import torch

    ids = inputs["input_ids"]
    index = getattr(getattr(vlm.model, "model", None), "get_rope_index", None)
    if index is None or not any(name.endswith("_grid_thw") for name in inputs):
        return torch.arange(ids.shape[1], device=ids.device).unsqueeze(0), 0
    known = inspect.signature(index).parameters
    positions, offsets = index(**{name: each for name, each in inputs.items() if name in known})
    return positions[:, 0], int(offsets.flatten()[0])
