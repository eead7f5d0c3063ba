"""Chunked prefill: how prompts are cut, which are taken together, and how long a chunk may be.

Legend: B rows, L tokens of a prompt, Q tokens of a chunk.
"""

import hashlib
import statistics
from collections import deque
from collections.abc import Collection, Hashable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tita.align.kv_cache import KeysAndValues, KVCache
from tita.align.sequence import Sequence
from tita.errors import TitaError
from tita.vlm.inputs import Inputs
from tita.vlm.loading import VLM

_SEE_AHEAD_WITHIN_IMAGES = ("gemma3",)
"""Models whose tokens see later ones only within an image, which is never cut."""

_PLACES_IN_OTHERS = ("image_token_pooling",)
"""Inputs with places in the pixels of the same prompt, as Molmo 2 has: prompts cannot be joined."""

_CHUNK_STEPS = 3.0
"""Time of a chunk, in decode steps."""
_MIN_CHUNK_TOKENS = 32


def sees_ahead(vlm: VLM) -> bool:
    """Whether prompt tokens may attend to later ones, as all of PaliGemma's do.

    Then the KV of an image depends on the question, and a prompt cannot be cut. Models whose mask
    is not causal provide their own masks for `generate`.
    """
    own_masks = hasattr(vlm.model, "create_masks_for_generate")
    return own_masks and vlm.model.config.model_type not in _SEE_AHEAD_WITHIN_IMAGES


@dataclass(slots=True, kw_only=True, eq=False)
class Prefill:
    """The prompt of one sequence on its way into one model."""

    inputs: Inputs
    """Output of the model's processor for one prompt."""
    source: str = "base"
    """Whose prompt it is."""
    positions: Tensor
    """[A, L] of its tokens, on A axes."""
    offset: int
    """Difference of position and index of later tokens."""
    max_new_tokens: int
    ids: list[int] = field(init=False)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """First and last column, exclusive, of the chunks that are left."""
    cache: KVCache | None = None
    row: int = 0
    """Its row in `cache`, which it may share with others."""
    alone: bool = False
    """Whether it must not be taken in with others."""
    prefix_key: Hashable = None
    """Key of the KV up to the last image in the prefix cache."""
    prefix_length: int = 0
    num_cached: int = 0
    """Tokens at its beginning that the prefix cache had."""
    prefix: KeysAndValues | None = None
    """The KV up to the last image, if the prefix cache had it."""
    _images_end: int = 0

    def __post_init__(self) -> None:
        self.ids = self.inputs["input_ids"][0].tolist()

    @property
    def length(self) -> int:
        """L."""
        return len(self.ids)

    @property
    def num_spare(self) -> int:
        """Columns to allocate beyond the next chunk: the rest of the prompt, and the answer.

        Few answers use all of `max_new_tokens`, so at most half the prompt's length is allocated.
        """
        taken = self.chunks[0][1] if self.chunks else self.length
        return self.length - taken + min(self.max_new_tokens, max(self.length // 2, 64))

    @property
    def extras(self) -> Inputs:
        """Inputs other than tokens and mask: image tensors, and some per token."""
        plain = ("input_ids", "attention_mask")
        return {name: value for name, value in self.inputs.items() if name not in plain}

    @property
    def kind(self) -> Hashable:
        """Prompts of the same kind can be taken in together; None: only alone."""
        if self.chunks != [(0, self.length)] or self.prefix_key is not None or self.alone:
            return None
        if not self.inputs.keys().isdisjoint(_PLACES_IN_OTHERS):
            return None
        shapes = [
            (name, () if self.is_per_token(name) else tuple(tensor.shape))
            for name, tensor in self.extras.items()
        ]
        return len(self.positions), *shapes

    def is_per_token(self, name: str) -> bool:
        """Whether one of the `extras` has a value for each token."""
        return bool(self.inputs[name].shape == self.inputs["input_ids"].shape)

    def cut(
        self,
        *,
        size: int,
        image_tokens: Collection[int],
        whole: bool,
        keep_images: bool,
        digest: str,
    ) -> None:
        """Cut the prompt into chunks of at most `size` tokens, except that images stay together.

        Args:
            size: tokens of a chunk.
            image_tokens: the tokens that depend on images, if the model has any.
            whole: leave the prompt in one chunk.
            keep_images: end a chunk with the last image, so that the KV up to there can be cached.
            digest: of the images.

        Raises:
            TitaError: there are images, but no token that stands for them.
        """
        images = [place for place, token in enumerate(self.ids) if token in image_tokens]
        if not images and not all(map(self.is_per_token, self.extras)):
            raise TitaError(
                "cannot tell which tokens of its prompt stand for images",
                remedy="correct `image_token_id` in the model's config.json",
            )
        end = self._images_end = self.length if whole else images[-1] + 1 if images else 0
        if keep_images and 0 < end < self.length:
            self.prefix_key = (hashlib.sha256(str(self.ids[:end]).encode()).digest(), digest)
            self.prefix_length = end
        if self.length <= size and self.prefix_key is None:
            end = self.length
        # All image tokens and their pixels go in one call; the rest is cut by size.
        rest = [(at, min(at + size, self.length)) for at in range(end, self.length, size)]
        self.chunks = [*([(0, end)] if end else []), *rest]

    def shorten(self, size: int) -> None:
        """Limit the next chunk to `size` tokens, unless it has images."""
        start, end = self.chunks[0]
        if start >= self._images_end and end - start > size:
            self.chunks[:1] = [(start, start + size), (start + size, end)]


def chunk_inputs(
    prefills: Items[Prefill], start: int, end: int, *, with_images: bool
) -> dict[str, Any]:
    """Model inputs of columns start to end: `input_ids[B, Q]`, `position_ids`, and the extras."""
    first = prefills[0]
    # Padding must not be an image token; the last token of a prompt is none.
    ids = [prefill.inputs["input_ids"] for prefill in prefills]
    positions = [prefill.positions for prefill in prefills]
    found: dict[str, Any] = {
        "input_ids": _align_right(ids, end, value=first.ids[-1])[:, start:end],
        "position_ids": torch.stack([_align_right([each], end) for each in positions], 1)[
            ..., start:end
        ],
    }
    if len(first.positions) == 1:
        found["position_ids"] = found["position_ids"][0]
    for name in first.extras:
        tensors = [prefill.inputs[name] for prefill in prefills]
        if first.is_per_token(name):
            found[name] = _align_right(tensors, end)[:, start:end]
        elif with_images:
            found[name] = torch.cat(tensors)
    return found


def _align_right(rows: Items[Tensor], width: int, *, value: int = 0) -> Tensor:
    """Rows[..., L] as one tensor[B, width], padded on the left."""
    missing = [max(width - row.shape[-1], 0) for row in rows]
    if any(missing):
        pad = torch.nn.functional.pad
        pairs = zip(rows, missing, strict=True)
        rows = [pad(row, (number, 0), value=value) for row, number in pairs]
    return torch.cat(list(rows))


@dataclass(slots=True)
class PendingPrefill:
    """A request whose prompt is not in the models yet."""

    sequence: Sequence
    prefills: dict[str, Prefill]
    """By name of the source."""
    num_failures: int = 0
    """Steps that failed with this prompt; it was begun again after each."""
    logits: dict[str, Tensor] = field(default_factory=dict)
    """[B, V] of the first new tokens of the requests that were taken in together."""

    @property
    def shares_prompt(self) -> bool:
        """Whether it may start with a copy of the rows of another request with its inputs."""
        return not self.num_failures and not any(each.cache for each in self.prefills.values())

    @property
    def num_left(self) -> int:
        """Prompt tokens that are left, over all sources."""
        return sum(
            end - start for prefill in self.prefills.values() for start, end in prefill.chunks
        )

    @property
    def kind(self) -> tuple[Hashable, ...] | None:
        """Requests of the same kind can be taken in together; None: only alone."""
        kinds = [(source, prefill.kind) for source, prefill in self.prefills.items()]
        return None if None in dict(kinds).values() else tuple(kinds)


def next_group(
    pending: Mapping[Hashable, PendingPrefill], *, oldest: bool, budget: int
) -> list[Hashable]:
    """Choose the request that is next, and others that can be taken in together with it.

    Args:
        pending: in order of arrival.
        oldest: take the oldest, so that long prompts are not starved; else the shortest, so that
            short ones do not wait for long ones. The caller alternates.
        budget: maximum number of tokens of the group.
    """
    if oldest:
        first = next(iter(pending))
    else:
        first = min(pending, key=lambda key: pending[key].num_left)
    kind = pending[first].kind
    group, longest = [first], pending[first].prefills["base"].length
    if kind is None:
        return group
    inputs = {id(pending[first].sequence.prepared.inputs)}
    for key, each in pending.items():
        if id(each.sequence.prepared.inputs) in inputs and each.shares_prompt:
            continue  # it starts with the copy of the other's rows
        wider = max(longest, each.prefills["base"].length)
        if key != first and each.kind == kind and wider * (len(group) + 1) <= budget:
            group.append(key)
            inputs.add(id(each.sequence.prepared.inputs))
            longest = wider
    return group


def sharing(
    pending: Mapping[Hashable, PendingPrefill], keys: Items[Hashable]
) -> dict[Hashable, int]:
    """Requests whose prompt is that of one of `keys`, such as several answers to one question.

    Returns:
        The place of that one in `keys`, by key of the other.
    """
    places = {id(pending[key].sequence.prepared.inputs): n for n, key in enumerate(keys)}
    if not all(pending[key].num_failures == 0 for key in keys):
        return {}
    return {
        key: places[id(each.sequence.prepared.inputs)]
        for key, each in pending.items()
        if key not in keys and each.shares_prompt and id(each.sequence.prepared.inputs) in places
    }


class ChunkPacer:
    """Limits the tokens of a prefill chunk by measured time.

    Chunked prefill (Sarathi, arXiv 2308.16369) limits a chunk by tokens. The cost of a token
    depends on model, machine and prompt, so here a chunk is limited by time: `_CHUNK_STEPS` times a
    decode step. The fixed cost of a chunk is about that of a decode step, so most of its time goes
    into tokens, and a long prompt is not much slower than in one piece.
    """

    def __init__(self, max_tokens: int) -> None:
        """Args:
        max_tokens: maximum number of tokens per chunk, however fast they are.
        """
        self._max_tokens = max_tokens
        self._num_tokens = float(max_tokens)
        self._steps: deque[float] = deque(maxlen=15)

    @property
    def num_tokens(self) -> int:
        """Maximum number of tokens of the next chunk."""
        return int(self._num_tokens)

    def note_out_of_memory(self) -> None:
        """Memory ran out during a chunk: halve the next one."""
        self._num_tokens = max(self._num_tokens / 2, min(_MIN_CHUNK_TOKENS, self._max_tokens))

    def note_decode(self, seconds: float) -> None:
        """A decode step took this long."""
        self._steps.append(seconds)

    def note_chunk(self, num_tokens: int, seconds: float) -> None:
        """A chunk of this number of tokens took this long."""
        if not self._steps or seconds <= 0:
            return
        wanted_s = _CHUNK_STEPS * statistics.median(self._steps)
        fitting = num_tokens * wanted_s / seconds
        if seconds > wanted_s:
            # At most by half at a time: one slow chunk may be an outlier.
            found = max(min(fitting, self._num_tokens), self._num_tokens / 2)
        elif 2 * num_tokens > self._num_tokens:
            found = max(self._num_tokens, min(fitting, self._num_tokens * 1.25))
        else:
            return  # fixed costs dominate a small chunk
        self._num_tokens = min(
            max(found, min(_MIN_CHUNK_TOKENS, self._max_tokens)), self._max_tokens
        )
