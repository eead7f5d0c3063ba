"""A device that is played by the CPU: counts what the host reads, refuses tensors of the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tita.align import draws, guidance, sampling
from tita.align.host_device import upload

_READS = frozenset(
    (
        "tolist", "item", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose",
        "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
    )
)  # fmt: skip


class OnDevice(Tensor):
    """A tensor of the device. Whatever is computed from it is on the device, too."""

    reads: ClassVar[list[int]] = []
    """Number of values of each copy to the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors([args, kwargs or {}]))
        name = getattr(func, "__name__", "")
        for tensor in given:
            if not isinstance(tensor, OnDevice) and tensor.dim():
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            tensor.dtype == torch.bool for tensor in _tensors(args[1])
        )
        if name in _READS or by_mask:
            cls.reads.append(given[0].numel())
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(tensor: Tensor) -> Tensor:
    """A copy on the device."""
    return tensor.clone().as_subclass(OnDevice)


@contextmanager
def fake_device(patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sampling takes `OnDevice` for a device; yields the sizes of copies to the host."""

    def uploaded(*args: Any) -> Tensor:
        return upload(*args).as_subclass(OnDevice)

    with patch.context() as within:
        for module in (draws, sampling):
            within.setattr(module, "reads_are_free", lambda _: False)
        within.setattr(draws, "send", lambda tensor, _: tensor.as_subclass(OnDevice))
        for module in (draws, guidance, sampling):
            within.setattr(module, "upload", uploaded)
        OnDevice.reads = []
        yield OnDevice.reads


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
