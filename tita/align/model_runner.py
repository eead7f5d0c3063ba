"""One model's forward passes over a continuous batch.

Legend: B rows, V tokens of the vocabulary, W columns of the cache. Rows are aligned on the right.
"""

import contextlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tita.align.host_device import upload
from tita.align.kv_cache import KeysAndValues, KVCache, PrefixCache
from tita.align.prefill import Prefill, chunk_inputs, sees_ahead
from tita.align.vocabulary import Vocabulary
from tita.vlm.inputs import Inputs, image_token_ids, prompt_positions
from tita.vlm.loading import VLM

_MASK_SPARE = 64
"""Columns of a mask beyond those that are in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedRow:
    """The state of a sequence in one model, outside of the batch."""

    columns: KeysAndValues
    """Its keys and values[1, H, W, D], in host memory."""
    source: str
    devices: list[torch.device]
    """Where each layer's were."""
    length: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerMark:
    """The state of a `ModelRunner` before a step."""

    keys: list[Hashable]
    sources: list[str]
    lengths: list[int]
    offsets: list[int]
    cache: KVCache | None
    columns: list[tuple[int, int, int]]


class ModelRunner:
    """The sequences that one model decodes. Not thread-safe.

    A sequence has one row for each view in which the model sees its request, and for each of the
    model's LoRA adapters that it uses; rows with different adapters are decoded in one forward.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        num_tokens: int,
        prefill_tokens: int,
        prefix_cache: PrefixCache,
        vocabulary: Vocabulary | None = None,
        adapters: Mapping[str, str | None] | None = None,
    ) -> None:
        """Args:
        vlm: the model.
        num_tokens: V, at most the model's; ids beyond are padding of its output layer.
        prefill_tokens: maximum number of tokens per prefill chunk, except for images.
        prefix_cache: cache of the KV of images.
        vocabulary: maps the model's token ids to the base model's, if they differ; then tokens and
            logits of `decode` and `extend` are in the base model's ids.
        adapters: the LoRA adapter of each role that the model has, None without; the model's own
            role alone if not given.
        """
        self.vlm = vlm
        self._device = vlm.device
        self.seconds = 0.0
        """Time in the model so far."""
        self.num_prefix_queries = 0
        """Prompts that were looked up in the prefix cache so far."""
        self.num_prefix_hits = 0
        """Prompts whose images were there."""
        self.keys: list[Hashable] = []
        """Of the sequences, in the order of the rows."""
        self.sources: list[str] = []
        """Names of the rows' sources: this model, in a view."""
        self.vocabulary = vocabulary
        self._num_tokens = num_tokens
        self._lengths: list[int] = []
        self._offsets: list[int] = []
        self._prefix_cache = prefix_cache
        self._prefill_tokens = prefill_tokens
        self._whole_prompts = sees_ahead(vlm)
        self._image_tokens = image_token_ids(vlm.model)
        self._cache: KVCache | None = None
        self._mask: Tensor | None = None
        """Of the last decode step, with further columns that all rows have tokens in."""
        self._starts: list[int] = []
        """The first column of each of its rows."""
        self._adapters = adapters or {}

    @property
    def num_cells(self) -> int:
        """B * W: tokens that the cache holds. Thread-safe."""
        cache = self._cache
        return 0 if cache is None else cache.num_cells

    def adapter_of(self, source: str) -> str | None:
        """The adapter of a source of this model, if it has one."""
        return self._adapters.get(source.partition("/")[0])

    def begin_prefill(
        self, inputs: Inputs, *, source: str, image_digest: str, max_new_tokens: int
    ) -> Prefill:
        """Cut a prompt into chunks, and skip its beginning if that is in the prefix cache."""
        positions, offset = prompt_positions(self.vlm, inputs)
        prefill = Prefill(
            inputs=inputs,
            source=source,
            positions=positions,
            offset=offset,
            max_new_tokens=max_new_tokens,
        )
        prefill.cut(
            size=self._prefill_tokens,
            image_tokens=self._image_tokens,
            whole=self._whole_prompts,
            keep_images=self._prefix_cache.max_bytes > 0,
            digest=image_digest,
        )
        if prefill.prefix_key is not None:
            prefill.prefix = self._prefix_cache.get(self._prefix_key(prefill))
            self.num_prefix_queries += 1
            if prefill.prefix is not None:
                self.num_prefix_hits += 1
                prefill.num_cached = prefill.prefix_length
                del prefill.chunks[0]
        return prefill

    def prefill(self, prefills: Sequence[Prefill]) -> Tensor | None:
        """Take in the next chunk of a prompt, or several whole prompts of the same kind and source.

        Returns:
            logits[B, V] of the first new tokens, if that was the last chunk.
        """
        first = prefills[0]
        if first.cache is None:
            # Copied only now, so that prompts that wait take no memory.
            spare = max(prefill.num_spare for prefill in prefills)
            if first.prefix is not None:
                spare += first.chunks[0][1] - first.prefix_length
            cache = KVCache(first.prefix or [], spare=spare)
            first.prefix = None
            for row, prefill in enumerate(prefills):
                prefill.cache, prefill.row = cache, row
        start, end = first.chunks[0][0], max(prefill.chunks[0][1] for prefill in prefills)
        lengths = [prefill.chunks[0][1] for prefill in prefills]
        has_images = not self._image_tokens.isdisjoint(first.ids[start:end])
        inputs = chunk_inputs(prefills, start, end, with_images=has_images)
        mask = _mask(lengths, end, self._device)
        logits = self._forward(
            sources=[first.source] * len(prefills),
            cache=first.cache,
            attention_mask=mask,
            logits_to_keep=1,
            **inputs,
        )
        for prefill in prefills:
            del prefill.chunks[0]
        if end == first.prefix_length and first.prefix_key is not None:
            assert first.cache is not None
            if self._prefix_cache.has_room(first.cache.num_bytes(end)):
                self._prefix_cache.put(self._prefix_key(first), first.cache.columns(0, end))
        return None if first.chunks else logits[:, -1]

    def add(
        self,
        prefilled: Sequence[tuple[Hashable, Prefill]],
        *,
        source: str,
        num_expected: int = 0,
    ) -> None:
        """Add sequences whose prompts were taken in together to the batch.

        Args:
            num_expected: sequences whose prompts are still being taken in.
        """
        if not prefilled:
            return
        cache = prefilled[0][1].cache
        assert cache is not None
        if self._cache is None:
            firsts = {prefill.row: (key, prefill) for key, prefill in reversed(prefilled)}
            self._adopt(cache, [*firsts.values()], source=source)
            taken = {key for key, _ in firsts.values()}
            num_expected += len(prefilled) - len(taken)
            for key, prefill in prefilled:
                if key not in taken:
                    num_expected -= 1
                    self.copy(firsts[prefill.row][0], key, num_expected=num_expected)
            return
        for length, alike in groupby(prefilled, key=lambda each: each[1].length):
            added = list(alike)
            rows = [prefill.row for _, prefill in added]
            self._cache.append(cache, rows=rows, width=length, num_expected=num_expected)
            self.keys += [key for key, _ in added]
            self.sources += [source] * len(added)
            self._lengths += [length] * len(added)
            self._offsets += [prefill.offset for _, prefill in added]

    def copy(self, key: Hashable, other: Hashable, *, num_expected: int = 0) -> None:
        """Add a row for `other` that is the newest one of `key`."""
        assert self._cache is not None
        row = len(self.keys) - 1 - self.keys[::-1].index(key)
        width = self._lengths[row]
        self._cache.append(self._cache, rows=[row], width=width, num_expected=num_expected)
        self.keys.append(other)
        self.sources.append(self.sources[row])
        self._lengths.append(self._lengths[row])
        self._offsets.append(self._offsets[row])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """One token per row, in the order of `keys`; returns logits[B, V] of the next ones."""
        return self._extend([[token] for token in tokens]).select(1, -1)

    def extend(self, tokens: Mapping[Hashable, Sequence[int]]) -> Tensor:
        """Q tokens of every sequence, by key; returns logits[B, Q, V] after each in its rows."""
        return self._extend([tokens[key] for key in self.keys])

    def plan_rollback(self, num_tokens: Mapping[Hashable, int]) -> Callable[[], None]:
        """A function that removes the newest tokens of sequences, by key; it allocates nothing.

        So several models either all remove theirs, or none does.
        """
        assert self._cache is not None
        cache = self._cache
        removed = [num_tokens[key] for key in self.keys]
        common = min(removed)
        buffers = cache.row_buffers() if max(removed) > common else {}

        def rollback() -> None:
            if common:
                cache.crop(-common)
            for row, number in enumerate(removed):
                if number > common:
                    cache.shift(row, number - common, buffers)
            self._lengths = [n - less for n, less in zip(self._lengths, removed, strict=True)]

        return rollback

    def mark(self) -> RunnerMark:
        """The state to which `restore` returns if the next step fails."""
        return RunnerMark(
            keys=[*self.keys],
            sources=[*self.sources],
            lengths=[*self._lengths],
            offsets=[*self._offsets],
            cache=self._cache,
            columns=[] if self._cache is None else self._cache.mark(),
        )

    def restore(self, mark: RunnerMark) -> None:
        """Forget the rows and tokens that were added since `mark`; no row was removed since."""
        self.keys, self.sources, self._cache = [*mark.keys], [*mark.sources], mark.cache
        self._lengths, self._offsets = [*mark.lengths], [*mark.offsets]
        if self._cache is not None:
            self._cache.restore(mark.columns)

    def park(self, keys: Sequence[Hashable]) -> dict[Hashable, list[ParkedRow]]:
        """Copies of the rows of these sequences in host memory, for those that have rows here."""
        parked: dict[Hashable, list[ParkedRow]] = {}
        for row, key in enumerate(self.keys):
            if key in keys and self._cache is not None:
                copied = ParkedRow(
                    columns=self._cache.copy_row(row, width=self._lengths[row], device="cpu"),
                    source=self.sources[row],
                    devices=self._cache.devices,
                    length=self._lengths[row],
                    offset=self._offsets[row],
                )
                parked.setdefault(key, []).append(copied)
        return parked

    def unpark(self, key: Hashable, parked: ParkedRow) -> None:
        """Add a row that was parked; it goes on as if it had never left."""
        if self._cache is None:
            pairs = zip(parked.columns, parked.devices, strict=True)
            self._cache = KVCache([(k.to(device), v.to(device)) for (k, v), device in pairs])
        else:
            self._cache.append_row(parked.columns)
        self.keys.append(key)
        self.sources.append(parked.source)
        self._lengths.append(parked.length)
        self._offsets.append(parked.offset)

    def shrink(self) -> None:
        """Free the memory of rows that have left."""
        if self._cache is not None:
            self._cache.shrink()

    def clear(self) -> None:
        """Remove all sequences. Runs no tensor operation, so it works on a device that is lost."""
        self.keys, self.sources, self._lengths, self._offsets = [], [], [], []
        self._cache, self._mask = None, None

    def remove(self, keys: set[Hashable]) -> None:
        """Remove sequences, and the columns that only they used."""
        if self._cache is None or not keys.intersection(self.keys):
            return
        stay = [number for number, key in enumerate(self.keys) if key not in keys]
        if not stay:
            self.clear()
            return
        # The last rows move into the holes, so that only they are copied.
        holes = [number for number in range(len(stay)) if self.keys[number] in keys]
        moves = list(zip([n for n in stay if n >= len(stay)], holes, strict=True))
        columns: list[list[Any]] = [self.keys, self.sources, self._lengths, self._offsets]
        for column in columns:
            for source, place in moves:
                column[place] = column[source]
            del column[len(stay) :]
        self._cache.keep(moves, num_rows=len(stay), width=max(self._lengths))

    def _adopt(
        self, cache: KVCache, prefilled: Sequence[tuple[Hashable, Prefill]], *, source: str
    ) -> None:
        """Take over the cache of a prefill; some of its rows may have ended already."""
        added = {prefill.row: (key, prefill.length, prefill.offset) for key, prefill in prefilled}
        rows = [added.get(row, (None, 0, 0)) for row in range(max(added) + 1)]
        self.keys = [key for key, _, _ in rows]
        self.sources = [source] * len(rows)
        self._lengths = [length for _, length, _ in rows]
        self._offsets = [offset for _, _, offset in rows]
        self._cache = cache
        cache.keep([], num_rows=len(rows), width=max(self._lengths))
        self.remove({None})

    def _extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        assert self._cache is not None
        if self.vocabulary is not None:
            tokens = [[self.vocabulary.reads[token] for token in row] for row in tokens]
        num_new = len(tokens[0])
        positions = [
            n + offset + count
            for n, offset in zip(self._lengths, self._offsets, strict=True)
            for count in range(num_new)
        ]
        self._lengths = [length + num_new for length in self._lengths]
        ids = [token for row in tokens for token in row]
        # Each creation of a small tensor costs more than what is in it.
        both = upload([*ids, *positions], torch.long, self._device)
        input_ids, position_ids = both.view(2, len(tokens), num_new).unbind()
        return self._forward(
            sources=self.sources,
            cache=self._cache,
            input_ids=input_ids,
            attention_mask=self._mask_of(self._cache.width + num_new),
            position_ids=position_ids,
            logits_to_keep=num_new,
        )

    def _mask_of(self, width: int) -> Tensor | None:
        """As `_mask`, of the rows of the batch: while they stay, only its width changes."""
        starts = [width - length for length in self._lengths]
        if not any(starts):
            return None
        if self._mask is None or starts != self._starts or width > self._mask.shape[1]:
            wide = width + _MASK_SPARE
            self._mask = _mask([wide - start for start in starts], wide, self._device)
            self._starts = starts
        assert self._mask is not None
        return self._mask[:, :width]

    def _forward(self, *, sources: Sequence[str], cache: KVCache | None, **inputs: Any) -> Tensor:
        """Logits[B, Q, V] of rows of these sources."""
        began = time.perf_counter()
        with self._adapters_of(sources):
            output = self.vlm.model(past_key_values=cache, use_cache=True, **inputs)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - began
        logits: Tensor = output.logits
        if logits.shape[-1] > self._num_tokens:
            logits = logits[..., : self._num_tokens]
        return logits if self.vocabulary is None else self.vocabulary.project(logits)

    def _adapters_of(self, sources: Sequence[str]) -> AbstractContextManager[None]:
        """Applies the adapters of rows of these sources."""
        pool = self.vlm.adapters
        if pool is None:
            return contextlib.nullcontext()
        return pool.selected([self.adapter_of(source) for source in sources])

    def _prefix_key(self, prefill: Prefill) -> Hashable:
        # The prefix cache outlives this runner, and serves all models.
        return id(self.vlm.model), self.adapter_of(prefill.source), prefill.prefix_key


def _mask(lengths: Sequence[int], width: int, device: Any) -> Tensor | None:
    """1 where a row[B, width] holds a token; None where all do: attention is faster without."""
    if min(lengths) == width:
        return None
    starts = upload([width - length for length in lengths], torch.long, device)
    return (torch.arange(width, device=device) >= starts.unsqueeze(-1)).long()
