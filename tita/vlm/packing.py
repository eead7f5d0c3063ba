"""Packs linear layers of a CPU model into the weight layout of oneDNN.

With plain weights a forward over four tokens takes one and a half to twice the time of one token,
though both read the weights once. Packed, eight tokens cost little more than one, which speculative
decoding needs. Weights are replaced, not copied. The model answers, is saved and is copied as
before. Moved to another device or dtype it is plain again. It cannot be trained, since an optimizer
would not find the weights; `unpack_linears` restores them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tita.errors import TitaError
from tita.vlm.loading import VLM

_NUM_TOKENS = 4
"""Number of tokens for which oneDNN chooses the layout."""
_CACHE_BYTES = 32 * 2**20
"""Smaller models may stay in a processor's cache, where the layout makes no difference."""


class PackedLinear(nn.Module):
    """A packed `nn.Linear` for inference, float32 on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        ops: Any = torch.ops.mkldnn
        self._packed = ops._reorder_linear_weight(linear.weight.detach(), _NUM_TOKENS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._apply_packed = ops._linear_pointwise
        self.training = False

    def forward(self, features: Tensor) -> Tensor:
        """features[..., in] to [..., out]."""
        found: Tensor = self._apply_packed(features, self._packed, self._bias, "none", [], "")
        return found

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight[out, in], bit for bit."""
        dense: Tensor = self._packed.to_dense()
        return dense

    @property
    def bias(self) -> Tensor | None:
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
        """Set evaluation mode.

        Raises:
            TitaError: training mode is requested.
        """
        if mode:
            raise TitaError(
                "a packed model cannot be trained",
                remedy="call tita.vlm.packing.unpack_linears first, or EngineOptions(pack=False)",
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Called by `to`, `cuda`, `half`: become a plain layer on another device or dtype."""
        if _can_be_packed(fn(torch.empty(0))):
            return self
        plain: nn.Module = nn.Module._apply(self.unpacked().eval(), fn)  # type: ignore[no-untyped-call]
        # `nn.Module.to` works in place and has no hook that replaces a child, so the layer changes
        # its own class; its parents need not be known.
        self.__class__, self.__dict__ = nn.Linear, plain.__dict__  # type: ignore[assignment]
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> "PackedLinear":
        return PackedLinear(self.unpacked())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight
        if self._bias is not None:
            destination[f"{prefix}bias"] = self._bias


def pack_linears(vlm: VLM) -> int:
    """Replace a model's linear layers with packed ones; returns their number.

    Layers on another device than the CPU, of another dtype than float32, or under a device map of
    accelerate stay, and so does a head that shares its weight with the embedding: packed, it would
    be a copy. Without oneDNN there are none.
    """
    found = list(_packable(vlm))
    _release_adapters(vlm)
    for module, name, linear in found:
        setattr(module, name, PackedLinear(linear))
    return len(found)


def pack_large(vlm: VLM) -> int:
    """As `pack_linears`, but only if the model is large enough for it to pay."""
    num_bytes = sum(linear.weight.nbytes for _, _, linear in _packable(vlm))
    return pack_linears(vlm) if num_bytes > _CACHE_BYTES else 0


def unpack_linears(vlm: VLM) -> int:
    """Restore a model's plain layers; returns their number."""
    model: nn.Module = vlm.model
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, PackedLinear)
    ]
    _release_adapters(vlm)
    for module, name, packed in found:
        setattr(module, name, packed.unpacked().train(packed.training))
    return len(found)


def _release_adapters(vlm: VLM) -> None:
    """Free the model's LoRA adapters: their hooks are on the layers that are replaced."""
    if vlm.adapters is not None:
        vlm.adapters.clear()


def _packable(vlm: VLM) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The layers that can be packed: parent, name, layer."""
    backend: Any = torch.backends.mkldnn
    if not backend.is_available():
        return
    model: nn.Module = vlm.model
    shared = vlm.model.get_input_embeddings().weight
    for module in model.modules():
        for name, child in module.named_children():
            # A hook of accelerate loads the layer's weight at every forward.
            if type(child) is not nn.Linear or hasattr(child, "_hf_hook"):
                continue
            if _can_be_packed(child.weight) and child.weight is not shared:
                yield module, name, child


def _can_be_packed(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32
