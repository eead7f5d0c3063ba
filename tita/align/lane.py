"""One model's side of continuous batching: rows join with a filled cache and leave when done.

Legend: B rows, L columns of the cache, V tokens of the vocabulary. Rows are padded on the left, so
that the newest token of every row stands in the last column.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from tita.align.preparing import context_length
from tita.vlm import VLM

if TYPE_CHECKING:
    from torch import Tensor

Layers = list[tuple["Tensor", "Tensor"]]
"""Keys and values[1, heads, L, head size] of every layer."""


class Prefill:
    """One row on its way in: its prompt is taken in piece by piece."""

    def __init__(self, inputs: dict[str, Any], *, pieces: Sequence[tuple[int, int]]) -> None:
        self.inputs = inputs
        self.pieces = list(pieces)
        self.cache: Any = None
        self.logits: Tensor | None = None
        """[V] of the first new token, once `pieces` is empty."""
        self.prefix_key: Hashable = None
        """What the KV up to the last image is kept under."""
        self.prefix_length = 0


class Lane:
    """The rows that one model is answering. Not thread-safe: the scheduler's thread owns it."""

    def __init__(self, vlm: VLM, *, prefill_tokens: int, prefixes: "PrefixCache") -> None:
        self.vlm = vlm
        self.seconds = 0.0
        """In the model, so far."""
        self.rows: list[Hashable] = []
        self._prefixes = prefixes
        self._prefill_tokens = prefill_tokens
        self._layers: Layers = []
        self._mask: Tensor | None = None

    @property
    def num_cells(self) -> int:
        """B * L: tokens that the cache has room for."""
        return 0 if self._mask is None else self._mask.numel()

    def begin(self, inputs: dict[str, Any], *, image_digest: str) -> Prefill:
        """A row's way in; what is kept of an earlier prompt with the same beginning is skipped."""
        from transformers.cache_utils import DynamicCache

        ids = inputs["input_ids"][0].tolist()
        images = [i for i, token in enumerate(ids) if token == self._image_token]
        end = images[-1] + 1 if images else 0
        prefill = Prefill(inputs, pieces=self._pieces(ids, inputs, end))
        prefill.cache = DynamicCache()
        if end and end < len(ids):
            prefill.prefix_key = (id(self), _digest(ids[:end]), image_digest)
            prefill.prefix_length = end
            kept = self._prefixes.get(prefill.prefix_key)
            if kept is not None:
                for number, (keys, values) in enumerate(kept):
                    prefill.cache.update(keys, values, number)
                prefill.pieces = _cut(end, len(ids), self._prefill_tokens)
        return prefill

    def advance(self, prefill: Prefill) -> bool:
        """Take in one more piece of a prompt; True when it was the last."""
        import torch

        start, end = prefill.pieces.pop(0)
        ids = prefill.inputs["input_ids"]
        pixels = {
            name: value
            for name, value in prefill.inputs.items()
            if name not in ("input_ids", "attention_mask")
        }
        piece = ids[:, start:end]
        has_images = bool((piece == self._image_token).any())
        began = time.perf_counter()
        output = self.vlm.model(
            input_ids=piece,
            attention_mask=torch.ones_like(ids[:, :end]),
            position_ids=torch.arange(start, end, device=ids.device).unsqueeze(0),
            past_key_values=prefill.cache,
            use_cache=True,
            logits_to_keep=1,
            **(pixels if has_images else {}),
        )
        if end == ids.shape[1]:
            prefill.logits = output.logits[0, -1]
        self._synchronise()
        self.seconds += time.perf_counter() - began
        if end == prefill.prefix_length:
            # Later updates make new tensors, so these can be shared as they are.
            self._prefixes.put(prefill.prefix_key, _layers(prefill.cache))
        return not prefill.pieces

    def join(self, key: Hashable, prefill: Prefill) -> None:
        """Let a row with its prompt taken in step along with the others."""
        import torch

        theirs = _layers(prefill.cache)
        length = theirs[0][0].shape[-2]
        mask = prefill.inputs["input_ids"].new_ones(1, length)
        if not self.rows:
            self._layers, self._mask = theirs, mask
        else:
            assert self._mask is not None
            width = max(length, self._mask.shape[1])
            self._layers = [
                (
                    torch.cat([_widen(ours[0], width), _widen(new[0], width)]),
                    torch.cat([_widen(ours[1], width), _widen(new[1], width)]),
                )
                for ours, new in zip(self._layers, theirs, strict=True)
            ]
            pad = torch.nn.functional.pad
            self._mask = torch.cat(
                [pad(self._mask, (width - self._mask.shape[1], 0)), pad(mask, (width - length, 0))]
            )
        self.rows.append(key)

    def step(self, tokens: "Sequence[int]") -> "Tensor":
        """Take in one token a row, in the order of `rows`; logits[B, V] of the next ones."""
        import torch
        from transformers.cache_utils import DynamicCache

        assert self._mask is not None
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        ids = torch.tensor(tokens, device=self._mask.device).unsqueeze(-1)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        began = time.perf_counter()
        output = self.vlm.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=self._mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        self._synchronise()
        self.seconds += time.perf_counter() - began
        self._layers = _layers(cache)
        logits: Tensor = output.logits[:, -1]
        return logits

    def leave(self, keys: "set[Hashable]") -> None:
        """Free the places of some rows, and the columns that only they filled."""
        import torch

        if self._mask is None or not keys.intersection(self.rows):
            return
        stay = [number for number, key in enumerate(self.rows) if key not in keys]
        self.rows = [self.rows[number] for number in stay]
        if not stay:
            self._layers, self._mask = [], None
            return
        rows = torch.tensor(stay, device=self._mask.device)
        mask = self._mask[rows]
        first = int(mask.any(0).int().argmax())
        self._mask = mask[:, first:]
        self._layers = [
            (keys_[rows][:, :, first:], values[rows][:, :, first:])
            for keys_, values in self._layers
        ]

    @property
    def context(self) -> int:
        """Tokens that one row can have at most."""
        return context_length(self.vlm)

    @property
    def _image_token(self) -> int:
        config = self.vlm.model.config
        return int(getattr(config, "image_token_id", None) or config.image_token_index)

    def _pieces(self, ids: list[int], inputs: dict[str, Any], end: int) -> list[tuple[int, int]]:
        # The image tokens and their pixels must come in one call; only what follows is cut small.
        head = [(0, end)] if end else []
        return head + _cut(end, len(ids), self._prefill_tokens)

    def _synchronise(self) -> None:
        if self.vlm.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.vlm.device)


class PrefixCache:
    """KV of prompts up to their last image; what was asked least recently goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Layers] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_queries = 0

    def get(self, key: Hashable) -> Layers | None:
        self.num_queries += 1
        if key not in self._kept:
            return None
        self.num_hits += 1
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: Hashable, layers: Layers) -> None:
        size = _size(layers)
        if size > self._max_bytes or key in self._kept:
            return
        self._kept[key] = layers
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= _size(self._kept.popitem(last=False)[1])


def _cut(start: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, end)) for at in range(start, end, size)]


def _digest(ids: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def _size(layers: Layers) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in layers for tensor in pair)


def _layers(cache: Any) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _widen(tensor: "Tensor", width: int) -> "Tensor":
    import torch

    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[-2], 0))
