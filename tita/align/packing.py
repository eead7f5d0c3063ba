"""Linear layers of a CPU model in the layout that its kernels read fastest.

A plain weight makes a forward over four tokens take one and a half to twice the time of one token,
though both read it once. Reordered for oneDNN, eight tokens cost little more than one, and drafting
lives on that. Weights are replaced, not copied: the model cannot be saved or trained any more.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from tita.vlm import VLM

_NUM_TOKENS = 4
"""The number of tokens that the layout is chosen for."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, float32 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        self._packed = ops._reorder_linear_weight(linear.weight.detach(), _NUM_TOKENS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._apply_packed = ops._linear_pointwise

    def forward(self, features: "Tensor") -> "Tensor":
        """features[..., in] to [..., out]."""
        found: Tensor = self._apply_packed(features, self._packed, self._bias, "none", [], "")
        return found


def _has_onednn() -> bool:
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available())


def pack_linears(vlm: "VLM") -> int:
    """Replace a model's linear layers by packed ones; how many.

    None are on another device than the CPU, of another type than float32, or without oneDNN. A head
    that shares its weight with the embedding stays as it is: packed, it would be a copy.
    """
    if vlm.device.type != "cpu" or not _has_onednn():
        return 0
    shared = vlm.model.get_input_embeddings().weight
    num_packed = 0
    for module in list(vlm.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or child.weight is shared:
                continue
            if child.weight.dtype is torch.float32 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))
                num_packed += 1
    return num_packed
