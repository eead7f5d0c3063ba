"""KV caches whose rows come and go, without a copy of the whole at every step.

transformers' `DynamicCache` makes new tensors of all keys and values at every token. Here a layer
has room to spare: a token is written in place, and only when the room is used up is it made half as
large again, so that what is copied stays in proportion to what is written.

Legend: B rows, W columns that hold tokens, H heads, D head size. Rows are flush at the right: the
newest token of every row stands in the last column, and what stands left of a shorter row is zero.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from tita.errors import TitaError
from tita.vlm import VLM

if TYPE_CHECKING:
    from torch import Tensor

KeysAndValues = list[tuple["Tensor", "Tensor"]]
"""Keys and values[B, H, W, D] of every layer."""

_SPARE = 64
"""Columns of room at least beyond what is needed now."""
_APART = frozenset(("cross_attention_mask", "image_attention_mask", "decoder_input_ids"))
"""What models take whose text attends to images in layers of its own, or which encode first."""


class RoomyLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: `[rows of room, H, columns of room, D]`, partly used."""

    is_sliding = False
    is_croppable = True

    def __init__(self, spare: int = _SPARE) -> None:
        """With so many columns of room beyond the first that come."""
        super().__init__()
        self._spare = spare
        self.num_rows = 0
        self.start = 0
        self.end = 0

    def lazy_initialization(self, key_states: "Tensor", value_states: "Tensor") -> None:
        self.num_rows = len(key_states)
        room = key_states.shape[-2] + self._spare
        self.keys = _room(key_states, len(key_states), room)
        self.values = _room(value_states, len(value_states), room)
        self.is_initialized = True

    def update(
        self, key_states: "Tensor", value_states: "Tensor", *_: Any, **__: Any
    ) -> tuple["Tensor", "Tensor"]:
        """Take in some columns, [B, H, Q, D] each; all keys and values[B, H, W + Q, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[-2]
        if self.end + num_new > self.keys.shape[-2]:
            self._relay(width=(3 * (self.end - self.start)) // 2 + num_new)
        at = slice(self.end, self.end + num_new)
        self.keys[: self.num_rows, :, at] = key_states
        self.values[: self.num_rows, :, at] = value_states
        self.end += num_new
        return self.used

    @property
    def used(self) -> tuple["Tensor", "Tensor"]:
        """Views of keys and values[B, H, W, D]."""
        rows, columns = slice(self.num_rows), slice(self.start, self.end)
        return self.keys[rows, :, columns], self.values[rows, :, columns]

    def get_seq_length(self) -> int:
        return self.end - self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns; as transformers has it, their number is negative."""
        self.end -= abs(tokens_to_remove)

    def narrow(self, width: int) -> None:
        """Forget the oldest columns, all but `width`."""
        self.start = self.end - width

    def move(self, source: int, place: int) -> None:
        """Overwrite the row at `place` by another."""
        for tensor in (self.keys, self.values):
            tensor[place, :, : self.end] = tensor[source, :, : self.end]

    def append(self, keys: "Tensor", values: "Tensor") -> None:
        """Add rows, [G, H, W', D] each, below the others."""
        width, total = keys.shape[-2], self.num_rows + len(keys)
        if width > self.end or total > len(self.keys):
            # Twice the rows: as with columns, copies stay in proportion to what comes.
            rows = len(self.keys) if total <= len(self.keys) else max(total, 2 * self.num_rows)
            self._relay(width=max(width, self.get_seq_length()) + _SPARE, rows=rows, left=width)
        self.start = min(self.start, self.end - width)
        for room, new in ((self.keys, keys), (self.values, values)):
            room[self.num_rows : total, :, : self.end - width] = 0
            room[self.num_rows : total, :, self.end - width : self.end] = new
        self.num_rows = total

    def _relay(self, *, width: int, rows: int | None = None, left: int = 0) -> None:
        """Move to other room, of so many columns, with the last one used at `left` or further."""
        used = self.get_seq_length()
        end = max(used, left)
        room_rows = rows or len(self.keys)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _room(old, room_rows, max(width, end) + _SPARE)
            new[: self.num_rows, :, end - used : end] = old[
                : self.num_rows, :, self.start : self.end
            ]
            setattr(self, name, new)
        self.start, self.end = end - used, end


def check_cacheable(vlm: VLM) -> None:
    """Look that keys and values of its tokens are all that a model keeps of its past.

    Raises:
        TitaError: it keeps more, such as the states of linear attention or keys of an image.
    """
    if not _APART.isdisjoint(inspect.signature(vlm.model.forward).parameters):
        raise TitaError(
            f"keeps images apart from its tokens ({vlm.model.config.model_type})",
            where=vlm.name,
            remedy="choose a model that reads images as tokens, as LLaVA does",
        )
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    layers = DynamicCache(config=vlm.model.config).layers
    others = sorted({type(each).__name__ for each in layers if type(each) not in plain})
    if others:
        raise TitaError(
            f"keeps more of its past than keys and values ({', '.join(others)})",
            where=vlm.name,
            remedy="choose a model whose layers all have plain attention",
        )


class RoomyCache(Cache):  # type: ignore[misc]
    """One `RoomyLayer` for each layer of a model."""

    def __init__(
        self,
        prefix: KeysAndValues = (),  # type: ignore[assignment]
        *,
        spare: int = _SPARE,
    ) -> None:
        """Begin with a copy of some columns, or empty, and room for `spare` more than come first.

        To move to other room leaves holes in a process's memory, so it is better not to have to.
        """
        super().__init__(layer_class_to_replicate=partial(RoomyLayer, max(spare, _SPARE)))
        for number, (keys, values) in enumerate(prefix):
            self.update(keys, values, number)

    @property
    def width(self) -> int:
        """W."""
        return int(self.get_seq_length())

    @property
    def num_cells(self) -> int:
        """B * W."""
        return self._layers[0].num_rows * self.width if self.layers else 0

    @property
    def size_bytes(self) -> int:
        """Of all room, used or spare."""
        tensors = [tensor for layer in self._layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def columns(self, start: int, end: int) -> KeysAndValues:
        """A copy of some of the columns in use."""
        return [
            (keys[:, :, start:end].clone(), values[:, :, start:end].clone())
            for keys, values in (layer.used for layer in self._layers)
        ]

    def append(self, other: "RoomyCache", *, row: int, width: int) -> None:
        """Add a row of another cache, its newest `width` columns."""
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            keys, values = theirs.used
            mine.append(keys[row : row + 1, :, -width:], values[row : row + 1, :, -width:])

    def keep(self, moves: Sequence[tuple[int, int]], *, num_rows: int, width: int) -> None:
        """Keep the first rows, after each (source, place) of `moves`, and the newest columns."""
        for layer in self._layers:
            for source, place in moves:
                layer.move(source, place)
            layer.num_rows = num_rows
            layer.narrow(width)

    @property
    def _layers(self) -> list[RoomyLayer]:
        # A model whose layers share their keys leaves some without any.
        return [layer for layer in self.layers if layer.is_initialized]


def _room(like: "Tensor", rows: int, columns: int) -> "Tensor":
    # Zeros: what a mask rules out is multiplied by zero, and chance bytes may be NaN.
    shape = (rows, like.shape[1], columns, like.shape[3])
    return like.new_zeros(shape)
