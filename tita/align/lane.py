"""One model's side of decoding: rows come in, take tokens in step, and leave.

Legend: B rows, V tokens of the vocabulary, W columns of the cache. Rows are flush at the right.
"""

import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from tita.align.prefill import Prefill, sees_ahead, together
from tita.align.prefixes import PrefixCache
from tita.align.preparing import context_length
from tita.align.vocabulary import Vocabulary
from tita.vlm import VLM, Inputs
from tita.vlm.positions import prompt_positions

if TYPE_CHECKING:
    from torch import Tensor

    from tita.align.cache import RoomyCache


class Lane:
    """The rows that one model is answering. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        vlm: VLM,
        *,
        num_tokens: int,
        prefill_tokens: int,
        prefixes: PrefixCache,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Args:
        vlm: the model.
        num_tokens: V, at most the model's; tokens beyond, which only round it up, are never said.
        prefill_tokens: longest piece of a prompt taken in at once, but for images.
        prefixes: where the KV of images is kept.
        vocabulary: how the model's tokens are the base's, if not by the same numbers; then all
            tokens and logits that go in and out of `step` and `extend` are by the base's.

        Raises:
            TitaError: the model keeps more of its past than keys and values.
        """
        from tita.align.cache import check_cacheable

        check_cacheable(vlm)
        self.vlm = vlm
        self._num_tokens = num_tokens
        self._vocabulary = vocabulary
        self.seconds = 0.0
        """In the model, so far."""
        self.rows: list[Hashable] = []
        self._lengths: list[int] = []
        self._offsets: list[int] = []
        self._prefixes = prefixes
        self._prefill_tokens = prefill_tokens
        self._whole_prompts = sees_ahead(vlm)
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

    def begin(self, inputs: Inputs, *, image_digest: str, max_new_tokens: int) -> Prefill:
        """A row's way in; what is kept of an earlier prompt with the same beginning is skipped."""
        from tita.align.cache import RoomyCache

        positions, offset = prompt_positions(self.vlm, inputs)
        prefill = Prefill(inputs, positions=positions, offset=offset, max_new_tokens=max_new_tokens)
        prefill.cut(
            size=self._prefill_tokens,
            image_token=self._image_token,
            whole=self._whole_prompts,
            keep_images=self._prefixes.max_bytes > 0,
            digest=image_digest,
        )
        if prefill.prefix_key is not None:
            kept = self._prefixes.get(self._key(prefill))
            if kept is not None:
                prefill.skip_prefix(RoomyCache(kept, spare=prefill.num_to_come))
        return prefill

    def advance(self, prefills: Sequence[Prefill]) -> "Tensor | None":
        """Take in one more piece of a prompt, or several whole prompts of the same kind.

        Returns:
            logits[B, V] of the first new tokens, if that was the last piece.
        """
        from tita.align.cache import RoomyCache

        first = prefills[0]
        if first.cache is None:
            cache = RoomyCache(spare=max(prefill.num_to_come for prefill in prefills))
            for row, prefill in enumerate(prefills):
                prefill.cache, prefill.row = cache, row
        start, end = first.pieces[0][0], max(prefill.pieces[0][1] for prefill in prefills)
        lengths = [prefill.pieces[0][1] for prefill in prefills]
        has_images = self._image_token in first.ids[start:end]
        inputs = together(prefills, start, end, with_images=has_images)
        mask = _mask(lengths, end, self.vlm.device)
        logits = self._forward(cache=first.cache, attention_mask=mask, logits_to_keep=1, **inputs)
        for prefill in prefills:
            del prefill.pieces[0]
        if end == first.prefix_length and first.prefix_key is not None:
            assert first.cache is not None
            self._prefixes.put(self._key(first), first.cache.columns(0, end))
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
            self._offsets.append(prefill.offset)

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
            self.rows, self._lengths, self._offsets, self._cache = [], [], [], None
            return
        # The last rows fill the holes, so that only they are copied.
        holes = [number for number in range(len(stay)) if self.rows[number] in keys]
        moves = list(zip([n for n in stay if n >= len(stay)], holes, strict=True))
        columns: list[list[Any]] = [self.rows, self._lengths, self._offsets]
        for column in columns:
            for source, place in moves:
                column[place] = column[source]
            del column[len(stay) :]
        self._cache.keep(moves, num_rows=len(stay), width=max(self._lengths))

    def _adopt(self, cache: "RoomyCache", entering: Sequence[tuple[Hashable, Prefill]]) -> None:
        """Take over the cache in which prompts came in; some of its rows may have ended already."""
        joined = {prefill.row: (key, prefill.length, prefill.offset) for key, prefill in entering}
        places = [joined.get(row, (None, 0, 0)) for row in range(max(joined) + 1)]
        self.rows = [key for key, _, _ in places]
        self._lengths = [length for _, length, _ in places]
        self._offsets = [offset for _, _, offset in places]
        self._cache = cache
        cache.keep([], num_rows=len(places), width=max(self._lengths))
        self.leave({None})

    def _extend(self, tokens: Sequence[Sequence[int]]) -> "Tensor":
        import torch

        assert self._cache is not None
        if self._vocabulary is not None:
            tokens = [[self._vocabulary.reads[token] for token in row] for row in tokens]
        device, num_new = self.vlm.device, len(tokens[0])
        firsts = [n + offset for n, offset in zip(self._lengths, self._offsets, strict=True)]
        self._lengths = [length + num_new for length in self._lengths]
        places = torch.arange(num_new, device=device)
        return self._forward(
            cache=self._cache,
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=_mask(self._lengths, self._cache.width + num_new, device),
            position_ids=torch.tensor(firsts, device=device).unsqueeze(-1) + places,
            logits_to_keep=num_new,
        )

    def _key(self, prefill: Prefill) -> Hashable:
        # A model outlives its lanes, and what is kept is the model's.
        return id(self.vlm.model), prefill.prefix_key

    def _forward(self, *, cache: "RoomyCache | None", **inputs: Any) -> "Tensor":
        began = time.perf_counter()
        output = self.vlm.model(past_key_values=cache, use_cache=True, **inputs)
        self._synchronise()
        self.seconds += time.perf_counter() - began
        logits: Tensor = output.logits[..., : self._num_tokens]
        return logits if self._vocabulary is None else self._vocabulary.project(logits)

    @property
    def _image_token(self) -> int | None:
        config = self.vlm.model.config
        names = ("image_token_id", "image_token_index")
        return next((int(at) for name in names if (at := getattr(config, name, None))), None)

    def _synchronise(self) -> None:
        if self.vlm.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.vlm.device)


def _mask(lengths: Sequence[int], width: int, device: Any) -> "Tensor | None":
    """1 where a row[B, width] holds a token; None where all do: attention is faster without."""
    import torch

    if min(lengths) == width:
        return None
    starts = torch.tensor([width - length for length in lengths], device=device)
    return (torch.arange(width, device=device) >= starts.unsqueeze(-1)).long()
