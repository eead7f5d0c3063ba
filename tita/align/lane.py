"""One model's side of decoding: rows come in, take tokens in step, and leave.

Legend: B rows, V tokens of the vocabulary, W columns of the cache. Rows are flush at the right.
"""

import hashlib
import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from tita.align.prefixes import PrefixCache
from tita.align.preparing import Inputs, context_length
from tita.vlm import VLM

if TYPE_CHECKING:
    from torch import Tensor

    from tita.align.cache import RoomyCache


class Prefill:
    """One row on its way in: its prompt is taken in piece by piece."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.ids: list[int] = inputs["input_ids"][0].tolist()
        self.pieces: list[tuple[int, int]] = []
        """First and last column, exclusive, of what is still to be taken in."""
        self.cache: RoomyCache | None = None
        self.row = 0
        """Its row in `cache`, which it may share with others."""
        self.prefix_key: Hashable = None
        """What the KV up to the last image is kept under."""
        self.prefix_length = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def kind(self) -> Hashable:
        """Prompts of the same kind can be taken in together; None: only by itself."""
        if self.pieces != [(0, self.length)] or self.prefix_key is not None:
            return None
        extras = _extras(self.inputs).items()
        return tuple((name, self._is_per_token(tensor) or tensor.shape) for name, tensor in extras)

    def _is_per_token(self, tensor: "Tensor") -> bool:
        return bool(tensor.shape == self.inputs["input_ids"].shape)


class Lane:
    """The rows that one model is answering. Not thread-safe: one thread owns it."""

    def __init__(
        self, vlm: VLM, *, num_tokens: int, prefill_tokens: int, prefixes: PrefixCache
    ) -> None:
        """Args:
        vlm: the model.
        num_tokens: V, at most the model's; tokens beyond, which only round it up, are never said.
        prefill_tokens: longest piece of a prompt taken in at once, but for images.
        prefixes: where the KV of images is kept.
        """
        self.vlm = vlm
        self._num_tokens = num_tokens
        self.seconds = 0.0
        """In the model, so far."""
        self.rows: list[Hashable] = []
        self._lengths: list[int] = []
        self._prefixes = prefixes
        self._prefill_tokens = prefill_tokens
        self._cache: RoomyCache | None = None

    @property
    def num_cells(self) -> int:
        """B * W: tokens that the cache has room for."""
        return 0 if self._cache is None else self._cache.num_cells

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, spare room included."""
        return 0 if self._cache is None else self._cache.size_bytes

    @property
    def context(self) -> int:
        """Tokens that one row can have at most."""
        return context_length(self.vlm)

    def begin(self, inputs: Inputs, *, image_digest: str) -> Prefill:
        """A row's way in; what is kept of an earlier prompt with the same beginning is skipped."""
        from tita.align.cache import RoomyCache

        prefill = Prefill(inputs)
        ids, size = prefill.ids, self._prefill_tokens
        images = [i for i, token in enumerate(ids) if token == self._image_token]
        end = images[-1] + 1 if images else 0
        kept = None
        if self._prefixes.max_bytes and 0 < end < len(ids):
            prefill.prefix_key = (id(self.vlm.model), _digest(ids[:end]), image_digest)
            prefill.prefix_length = end
            kept = self._prefixes.get(prefill.prefix_key)
        if kept is not None:
            prefill.cache = RoomyCache(kept)
            prefill.pieces = _cut(end, len(ids), size)
        elif len(ids) <= size and prefill.prefix_key is None:
            prefill.pieces = [(0, len(ids))]
        else:
            # The image tokens and their pixels come in one call; what follows is cut small.
            prefill.pieces = [*([(0, end)] if end else []), *_cut(end, len(ids), size)]
        return prefill

    def advance(self, prefills: Sequence[Prefill]) -> "Tensor | None":
        """Take in one more piece of a prompt, or several whole prompts of the same kind.

        Returns:
            logits[B, V] of the first new tokens, if that was the last piece.
        """
        import torch

        from tita.align.cache import RoomyCache

        first = prefills[0]
        if first.cache is None:
            cache = RoomyCache()
            for row, prefill in enumerate(prefills):
                prefill.cache, prefill.row = cache, row
        start, end = first.pieces[0]
        if len(prefills) > 1:
            end = max(prefill.length for prefill in prefills)
        lengths = [prefill.length if len(prefills) > 1 else end for prefill in prefills]
        rows = [prefill.inputs["input_ids"] for prefill in prefills]
        # Whatever pads must be no image token; the last of a prompt is none.
        ids = _padded(rows, end, value=first.ids[-1])[:, start:end]
        extras = _together(prefills, start, end, with_images=self._has_images(ids))
        positions = torch.arange(start, end, device=ids.device).repeat(len(prefills), 1)
        if min(lengths) < end:
            # Without these a row's padding would count as text before it.
            positions = (positions - positions.new_tensor([[end - n] for n in lengths])).clamp(0)
        logits = self._forward(
            ids,
            positions,
            cache=first.cache,
            mask=_mask(lengths, end, ids.device),
            keep=1,
            **extras,
        )
        for prefill in prefills:
            del prefill.pieces[0]
        if end == first.prefix_length and first.prefix_key is not None:
            assert first.cache is not None
            self._prefixes.put(first.prefix_key, first.cache.columns(0, end))
        return None if first.pieces else logits[:, -1]

    def join(self, entering: Sequence[tuple[Hashable, Prefill]]) -> None:
        """Let rows whose prompts were taken in together take tokens in step with the others."""
        if not entering:
            return
        cache = entering[0][1].cache
        assert cache is not None
        if self._cache is None:
            self._adopt(cache, entering)
            return
        for key, prefill in entering:
            self._cache.append(cache, row=prefill.row, width=prefill.length)
            self.rows.append(key)
            self._lengths.append(prefill.length)

    def step(self, tokens: Sequence[int]) -> "Tensor":
        """Take in one token a row, in the order of `rows`; logits[B, V] of the next ones."""
        return self._extend([[token] for token in tokens])[:, -1]

    def extend(self, tokens: Sequence[int]) -> "Tensor":
        """Take in Q tokens of the only row; logits[Q, V] after each."""
        assert len(self.rows) == 1
        return self._extend([tokens])[0]

    def forget(self, num_tokens: int) -> None:
        """Undo the newest tokens of the only row."""
        assert len(self.rows) == 1
        assert self._cache is not None
        if num_tokens:
            self._cache.crop(-num_tokens)
            self._lengths[0] -= num_tokens

    def leave(self, keys: "set[Hashable]") -> None:
        """Free the places of some rows, and the columns that only they filled."""
        if self._cache is None or not keys.intersection(self.rows):
            return
        stay = [number for number, key in enumerate(self.rows) if key not in keys]
        if not stay:
            self.rows, self._lengths, self._cache = [], [], None
            return
        # The last rows fill the holes, so that only they are copied.
        holes = [number for number in range(len(stay)) if self.rows[number] in keys]
        moves = list(zip([n for n in stay if n >= len(stay)], holes, strict=True))
        for source, place in moves:
            self.rows[place], self._lengths[place] = self.rows[source], self._lengths[source]
        del self.rows[len(stay) :], self._lengths[len(stay) :]
        self._cache.keep(moves, num_rows=len(stay), width=max(self._lengths))

    def _adopt(self, cache: "RoomyCache", entering: Sequence[tuple[Hashable, Prefill]]) -> None:
        """Take over the cache in which prompts came in; some of its rows may have ended already."""
        joined = {prefill.row: (key, prefill.length) for key, prefill in entering}
        places = [joined.get(row, (None, 0)) for row in range(max(joined) + 1)]
        self.rows = [key for key, _ in places]
        self._lengths = [length for _, length in places]
        self._cache = cache
        cache.keep([], num_rows=len(places), width=max(self._lengths))
        self.leave({None})

    def _extend(self, tokens: Sequence[Sequence[int]]) -> "Tensor":
        import torch

        assert self._cache is not None
        device, num_new = self.vlm.device, len(tokens[0])
        starts = torch.tensor(self._lengths, device=device).unsqueeze(-1)
        self._lengths = [length + num_new for length in self._lengths]
        mask = _mask(self._lengths, self._cache.width + num_new, device)
        ids = torch.tensor(tokens, device=device)
        positions = starts + torch.arange(num_new, device=device)
        return self._forward(ids, positions, cache=self._cache, mask=mask, keep=num_new)

    def _forward(
        self,
        ids: "Tensor",
        positions: "Tensor",
        *,
        cache: "RoomyCache | None",
        mask: "Tensor | None",
        keep: int,
        **extras: Any,
    ) -> "Tensor":
        began = time.perf_counter()
        output = self.vlm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            **extras,
        )
        self._synchronise()
        self.seconds += time.perf_counter() - began
        logits: Tensor = output.logits[..., : self._num_tokens]
        return logits

    def _has_images(self, ids: "Tensor") -> bool:
        return bool((ids == self._image_token).any())

    @property
    def _image_token(self) -> int:
        config = self.vlm.model.config
        return int(getattr(config, "image_token_id", None) or config.image_token_index)

    def _synchronise(self) -> None:
        if self.vlm.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.vlm.device)


def _extras(inputs: Inputs) -> Inputs:
    """What a model's processor gives beside the tokens."""
    return {
        name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")
    }


def _together(
    prefills: Sequence[Prefill], start: int, end: int, *, with_images: bool
) -> dict[str, Any]:
    """Image tensors one after another, and per-token ones of some columns."""
    import torch

    found = {}
    for name, tensor in _extras(prefills[0].inputs).items():
        tensors = [prefill.inputs[name] for prefill in prefills]
        if tensor.shape == prefills[0].inputs["input_ids"].shape:
            found[name] = _padded(tensors, end)[:, start:end]
        elif with_images:
            found[name] = tensor if len(tensors) == 1 else torch.cat(tensors)
    return found


def _padded(rows: Sequence["Tensor"], width: int, *, value: int = 0) -> "Tensor":
    """Rows[1, L] of unequal lengths as one tensor[B, width], flush at the right."""
    import torch

    if len(rows) == 1:
        return rows[0]
    pad = torch.nn.functional.pad
    return torch.cat([pad(row, (width - row.shape[1], 0), value=value) for row in rows])


def _mask(lengths: Sequence[int], width: int, device: Any) -> "Tensor | None":
    """1 where a row[B, width] holds a token; None where all do: attention is faster without."""
    import torch

    if min(lengths) == width:
        return None
    starts = torch.tensor([width - length for length in lengths], device=device)
    return (torch.arange(width, device=device) >= starts.unsqueeze(-1)).long()


def _cut(start: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, end)) for at in range(start, end, size)]


def _digest(ids: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
