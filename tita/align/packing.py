"""Linear layers of a CPU model in the layout that its kernels read fastest.

A plain weight makes a forward over four tokens take one and a half to twice the time of one token,
though both read it once. Reordered for oneDNN, eight tokens cost little more than one, and drafting
lives on that. Weights are replaced, not copied. The model answers, is saved and is copied as
before. Moved to another device or type it is plain again. Training it is refused, since no
optimizer would find the weights; `unpack_linears` gives them back.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tita.errors import TitaError

if TYPE_CHECKING:
    from torch import Tensor

    from tita.vlm import VLM

_NUM_TOKENS = 4
"""The number of tokens that the layout is chosen for."""
_CACHE_BYTES = 32 * 2**20
"""Fewer weights may stay in a processor's cache, and are read fast however they lie."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, float32 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        ops: Any = torch.ops.mkldnn
        self._packed = ops._reorder_linear_weight(linear.weight.detach(), _NUM_TOKENS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._apply_packed = ops._linear_pointwise
        self.training = False

    def forward(self, features: "Tensor") -> "Tensor":
        """features[..., in] to [..., out]."""
        found: Tensor = self._apply_packed(features, self._packed, self._bias, "none", [], "")
        return found

    @property
    def weight(self) -> "Tensor":
        """A copy of the weight[out, in] as it was, bit for bit."""
        dense: Tensor = self._packed.to_dense()
        return dense

    @property
    def bias(self) -> "Tensor | None":
        return self._bias

    def unpacked(self) -> nn.Linear:
        """The plain layer."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self._bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.weight)
        if self._bias is not None:
            linear.bias = nn.Parameter(self._bias.clone())
        return linear

    def train(self, mode: bool = True) -> "PackedLinear":
        """As of any module, but only out of training.

        Raises:
            TitaError: into training.
        """
        if mode:
            raise TitaError(
                "a model that is packed for a CPU cannot be trained",
                remedy="call tita.align.packing.unpack_linears first, or EngineOptions(pack=False)",
            )
        return self

    def _apply(self, fn: Callable[["Tensor"], "Tensor"], recurse: bool = True) -> nn.Module:
        """What `to`, `cuda`, `half` and their like call: become a plain layer if it moves us."""
        if _can_be_packed(fn(torch.empty(0))):
            return self
        plain: nn.Module = nn.Module._apply(self.unpacked().eval(), fn)  # type: ignore[no-untyped-call]
        # In place, so that whoever holds the layer need not be found.
        self.__class__, self.__dict__ = nn.Linear, plain.__dict__  # type: ignore[assignment]
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> "PackedLinear":
        return PackedLinear(self.unpacked())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight
        if self._bias is not None:
            destination[f"{prefix}bias"] = self._bias


def pack_linears(vlm: "VLM") -> int:
    """Replace a model's linear layers by packed ones; how many.

    None are on another device than the CPU, of another type than float32, spread by accelerate, or
    without oneDNN. A head that shares its weight with the embedding stays as it is: packed, it
    would be a copy.
    """
    found = list(_packable(vlm))
    for module, name, linear in found:
        setattr(module, name, PackedLinear(linear))
    return len(found)


def pack_large(vlm: "VLM") -> int:
    """As `pack_linears`, of a model that is large enough for it to pay; how many."""
    num_bytes = sum(linear.weight.nbytes for _, _, linear in _packable(vlm))
    return pack_linears(vlm) if num_bytes > _CACHE_BYTES else 0


def unpack_linears(vlm: "VLM") -> int:
    """Give a model its plain layers back; how many."""
    model: nn.Module = vlm.model
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, PackedLinear)
    ]
    for module, name, packed in found:
        setattr(module, name, packed.unpacked().train(packed.training))
    return len(found)


def _packable(vlm: "VLM") -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The layers that can be packed, and where they are."""
    if not _has_onednn():
        return
    model: nn.Module = vlm.model
    shared = vlm.model.get_input_embeddings().weight
    for module in model.modules():
        for name, child in module.named_children():
            # What accelerate has a hook on comes from elsewhere at every forward.
            if type(child) is not nn.Linear or hasattr(child, "_hf_hook"):
                continue
            if _can_be_packed(child.weight) and child.weight is not shared:
                yield module, name, child


def _can_be_packed(weight: "Tensor") -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32


def _has_onednn() -> bool:
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available())
