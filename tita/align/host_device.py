"""Copies from the host to a device that do not wait for the device, and where reading is free."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMPY: dict[torch.dtype, Any] = {
    torch.bool: np.bool_, torch.long: np.int64, torch.float32: np.float32,
}  # fmt: skip


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values on the device."""
    # numpy reads a list several times as fast as torch does. Each operation counts: after a forward
    # the processor's caches hold none of its code.
    return send(torch.from_numpy(np.array(values, _NUMPY[dtype])), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device."""
    if device.type == "cpu":
        return tensor
    if device.type == "cuda" and not tensor.is_pinned():
        # From pageable memory, a copy waits until the device has done what it was given before.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def reads_are_free(device: torch.device) -> bool:
    """Whether the host reads a tensor of the device without a copy."""
    return device.type == "cpu"
