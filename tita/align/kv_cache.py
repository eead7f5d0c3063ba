"""KV caches of a continuous batch, and a cache of image prefixes.

transformers' `DynamicCache` allocates new tensors for all keys and values at every token. Here a
layer is preallocated: a token is written in place, and when the capacity is used up it grows by
half, so that the copied volume stays in proportion to the written one.

Legend: B rows, W columns that hold tokens, H heads, D head size. Rows are aligned on the right: the
newest token of every row is in the last column, and the columns left of a shorter row are zero.
"""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from tita.errors import TitaError

logger = logging.getLogger(__name__)

KeysAndValues = list[tuple[Tensor, Tensor]]
"""Keys and values[B, H, W, D] of every layer."""

_SPARE = 64
"""Minimum number of spare columns."""
_CROSS_ATTENTION = frozenset(("cross_attention_mask", "image_attention_mask", "decoder_input_ids"))
"""Arguments of models whose text attends to images in separate layers, or of encoder-decoders."""

_PLAIN_LAYERS = frozenset(
    # By name: transformers before 5.20 has no `DummyLayer`, which holds nothing.
    (DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__, "DummyLayer")
)


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: `[row capacity, H, column capacity, D]`, partly used."""

    is_sliding = False
    is_croppable = True

    def __init__(self, spare: int = _SPARE) -> None:
        """Args:
        spare: spare columns beyond the first update.
        """
        super().__init__()
        self._spare = spare
        self.num_rows = 0
        self.start = 0
        self.end = 0
        self._num_written = 0
        """Columns that were appended and not cropped, which no reallocation changes."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.num_rows = len(key_states)
        capacity = key_states.shape[-2] + self._spare
        self.keys = _zeros(key_states, len(key_states), capacity)
        self.values = _zeros(value_states, len(value_states), capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns, [B, H, Q, D] each; returns all keys and values[B, H, W + Q, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[-2]
        if self.end + num_new > self.keys.shape[-2]:
            self._reallocate(width=(3 * (self.end - self.start)) // 2 + num_new)
        at = slice(self.end, self.end + num_new)
        self.keys[: self.num_rows, :, at] = key_states
        self.values[: self.num_rows, :, at] = value_states
        self.end += num_new
        self._num_written += num_new
        return self.used

    @property
    def used(self) -> tuple[Tensor, Tensor]:
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
        """Remove the newest columns; their number is negative, as in transformers."""
        self.end -= abs(tokens_to_remove)
        self._num_written -= abs(tokens_to_remove)

    def narrow(self, width: int) -> None:
        """Remove the oldest columns, all but `width`."""
        self.start = self.end - width

    def mark(self) -> tuple[int, int, int]:
        """What `restore` needs to remove rows and columns that are added from now on."""
        return self.num_rows, self.get_seq_length(), self._num_written

    def restore(self, mark: tuple[int, int, int]) -> None:
        """Remove the rows and columns that were added since `mark`; no row was removed since."""
        self.num_rows, width, num_written = mark
        self.end -= self._num_written - num_written
        self.start = self.end - width
        self._num_written = num_written

    def shrink(self) -> None:
        """Free the memory of rows and columns that are not used."""
        if self.num_rows < len(self.keys):
            self._reallocate(width=self.get_seq_length(), rows=self.num_rows)

    def move(self, source: int, place: int) -> None:
        """Overwrite the row at `place` with another."""
        for tensor in (self.keys, self.values):
            tensor[place, :, : self.end] = tensor[source, :, : self.end]

    def row_buffer(self) -> Tensor:
        """Memory for `shift`: [H, W, D]."""
        return torch.empty_like(self.keys[0, :, : self.get_seq_length()])

    def shift(self, row: int, columns: int, buffer: Tensor) -> None:
        """Move a row to the right, over its newest columns; allocates nothing."""
        kept = buffer[:, : self.get_seq_length() - columns]
        for tensor in (self.keys, self.values):
            kept.copy_(tensor[row, :, self.start : self.end - columns])
            tensor[row, :, self.start + columns : self.end] = kept
            tensor[row, :, self.start : self.start + columns] = 0

    def append(self, keys: Tensor, values: Tensor, *, num_expected: int = 0) -> None:
        """Add rows, [G, H, W', D] each, below the others.

        Args:
            num_expected: rows that will follow soon.
        """
        width, total = keys.shape[-2], self.num_rows + len(keys)
        if width > self.end or total > len(self.keys):
            rows = len(self.keys)
            if total > rows:
                # As with columns, copies stay in proportion to what is added. What is expected may
                # never come, or not fit into memory: not more rows of it than there are others.
                rows = max(total + min(num_expected, total), (3 * self.num_rows) // 2)
            self._reallocate(
                width=max(width, self.get_seq_length()) + _SPARE, rows=rows, left=width
            )
        self.start = min(self.start, self.end - width)
        for tensor, new in ((self.keys, keys), (self.values, values)):
            tensor[self.num_rows : total, :, : self.end - width] = 0
            tensor[self.num_rows : total, :, self.end - width : self.end] = new
        self.num_rows = total

    def _reallocate(self, *, width: int, rows: int | None = None, left: int = 0) -> None:
        """Move to new tensors of at least `width` columns, the last used one at `left` or later."""
        used = self.get_seq_length()
        end = max(used, left)
        num_rows = rows or len(self.keys)

        def moved(old: Tensor) -> Tensor:
            new = _zeros(old, num_rows, max(width, end) + _SPARE)
            new[: self.num_rows, :, end - used : end] = old[
                : self.num_rows, :, self.start : self.end
            ]
            return new

        # Both or none: memory may run out in between, and the layer must stay as it was.
        self.keys, self.values = moved(self.keys), moved(self.values)
        self.start, self.end = end - used, end


class KVCache(Cache):  # type: ignore[misc]
    """One `KVLayer` for each layer of a model."""

    def __init__(
        self,
        prefix: KeysAndValues = (),  # type: ignore[assignment]
        *,
        spare: int = _SPARE,
    ) -> None:
        """Args:
        prefix: columns to begin with, copied.
        spare: spare columns beyond the first update. Reallocation fragments the process's memory,
            so it is better to give enough.
        """
        super().__init__(layer_class_to_replicate=partial(KVLayer, max(spare, _SPARE)))
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
    def devices(self) -> list[torch.device]:
        """Of the layers."""
        return [layer.keys.device for layer in self._layers]

    def num_bytes(self, width: int) -> int:
        """Size of this number of columns of one row."""
        return sum(tensor[0, :, :width].nbytes for layer in self._layers for tensor in layer.used)

    def columns(self, start: int, end: int) -> KeysAndValues:
        """A copy of some of the used columns."""
        return [
            (keys[:, :, start:end].clone(), values[:, :, start:end].clone())
            for keys, values in (layer.used for layer in self._layers)
        ]

    def copy_row(self, row: int, *, width: int, device: str) -> KeysAndValues:
        """A copy of a row, its newest `width` columns, on a device."""
        newest = (slice(row, row + 1), slice(None), slice(-width, None))
        return [
            (keys[newest].to(device, copy=True), values[newest].to(device, copy=True))
            for keys, values in (layer.used for layer in self._layers)
        ]

    def mark(self) -> list[tuple[int, int, int]]:
        """What `restore` needs to remove rows and columns that are added from now on."""
        return [layer.mark() for layer in self._layers]

    def restore(self, mark: list[tuple[int, int, int]]) -> None:
        """Remove the rows and columns that were added since `mark`."""
        for layer, each in zip(self._layers, mark, strict=True):
            layer.restore(each)

    def shrink(self) -> None:
        """Free the memory of rows and columns that are not used."""
        for layer in self._layers:
            layer.shrink()

    def append_row(self, columns: KeysAndValues) -> None:
        """Add a row, [1, H, W', D] of each layer, from any device."""
        for layer, (keys, values) in zip(self._layers, columns, strict=True):
            layer.append(keys, values)

    def append(
        self, other: "KVCache", *, rows: Sequence[int], width: int, num_expected: int = 0
    ) -> None:
        """Add rows of another cache, their newest `width` columns.

        Args:
            num_expected: as of `KVLayer.append`.
        """
        first, last = rows[0], rows[-1]
        in_order = list(rows) == [*range(first, last + 1)]
        # A list of rows copies them once more.
        which = slice(first, last + 1) if in_order else list(rows)
        newest = (which, slice(None), slice(-width, None))
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            keys, values = theirs.used
            mine.append(keys[newest], values[newest], num_expected=num_expected)

    def keep(self, moves: Sequence[tuple[int, int]], *, num_rows: int, width: int) -> None:
        """Apply the row `moves` (source, place), then keep the first rows and newest columns."""
        for layer in self._layers:
            for source, place in moves:
                layer.move(source, place)
            layer.num_rows = num_rows
            layer.narrow(width)

    def row_buffers(self) -> dict[tuple[Any, ...], Tensor]:
        """Memory for `shift`, by device and shape of the layers."""
        found: dict[tuple[Any, ...], Tensor] = {}
        for layer in self._layers:
            key = _kind(layer)
            if key not in found:
                found[key] = layer.row_buffer()
        return found

    def shift(self, row: int, columns: int, buffers: dict[tuple[Any, ...], Tensor]) -> None:
        """Remove a row's newest columns: move it to the right, over them."""
        for layer in self._layers:
            layer.shift(row, columns, buffers[_kind(layer)])

    @property
    def _layers(self) -> list[KVLayer]:
        # In models that share keys between layers, some layers hold none.
        return [layer for layer in self.layers if layer.is_initialized]


class PrefixCache:
    """KV of prompts up to their last image, for the next question about it; least recently used
    entries are evicted."""

    def __init__(self, max_bytes: int) -> None:
        """Args:
        max_bytes: capacity; 0 disables the cache.
        """
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, KeysAndValues] = OrderedDict()
        self.num_bytes = 0
        self._warned = False

    def get(self, key: Hashable) -> KeysAndValues | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Remove all entries, to free their memory."""
        self._kept.clear()
        self.num_bytes = 0

    def has_room(self, size: int) -> bool:
        """Whether an entry of this size can be kept, if all others are evicted."""
        if size > self.max_bytes and not self._warned:
            self._warned = True
            logger.warning(
                "the keys and values of a prompt's images have %s bytes, more than the prefix "
                "cache (%s), and are not kept; raise --prefix-cache-mib",
                *(f"{size:,}", f"{self.max_bytes:,}"),
            )
        return size <= self.max_bytes

    def put(self, key: Hashable, columns: KeysAndValues) -> None:
        size = _num_bytes(columns)
        if size > self.max_bytes or key in self._kept:
            return
        self._kept[key] = columns
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _num_bytes(self._kept.popitem(last=False)[1])


def check_cacheable(config: Any, forward: Callable[..., Any], *, where: str) -> None:
    """Check that a `KVCache` holds all state that a model keeps between tokens.

    Args:
        config: of the model.
        forward: its method, or that of its class.
        where: its name in errors.

    Raises:
        TitaError: it keeps more, such as states of linear attention or separate keys of an image,
            or a token's place in the cache has a meaning.
    """
    arguments = inspect.signature(forward).parameters
    if not _CROSS_ATTENTION.isdisjoint(arguments):
        raise TitaError(
            f"keeps images apart from its tokens ({config.model_type})",
            where=where,
            remedy="choose a model that reads images as tokens, as LLaVA does",
        )
    # A wrapper may take any arguments by name, and names none.
    if "position_ids" not in arguments and "input_ids" in arguments:
        raise TitaError(
            f"does not take the positions of its tokens ({config.model_type})",
            where=where,
            remedy="choose a model of another family",
        )
    if hasattr(config.get_text_config(), "attn_temperature_tuning"):
        # By column, and not by position: rows of a batch are aligned on the right.
        raise TitaError(
            f"scales attention by a token's place in the cache ({config.model_type})",
            where=where,
            remedy="choose a model of another family",
        )
    layers = DynamicCache(config=config).layers
    others = sorted({type(each).__name__ for each in layers} - _PLAIN_LAYERS)
    if others:
        raise TitaError(
            f"keeps more between tokens than keys and values ({', '.join(others)})",
            where=where,
            remedy="choose a model whose layers all have plain attention",
        )


def _kind(layer: KVLayer) -> tuple[Any, ...]:
    return layer.keys.device, layer.keys.shape[1], layer.keys.shape[3]


def _zeros(like: Tensor, rows: int, columns: int) -> Tensor:
    # Masked values are multiplied by zero, and uninitialised memory may hold NaN.
    return like.new_zeros((rows, like.shape[1], columns, like.shape[3]))


def _num_bytes(columns: KeysAndValues) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in columns for tensor in pair)
