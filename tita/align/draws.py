"""Draws the tokens of a batch: penalties, temperature, top-k, top-p, and seeded noise.

Choosing argmax(log p + g) with g from the standard Gumbel distribution draws from p (the Gumbel-max
trick, arXiv 1611.01144). With g a function of (seed, position) alone, the draw does not depend on
the batch, on the device, or on how many tokens were drafted.

Noise is made on the host, because a device has no generator that gives the same numbers, and goes
to the device in one copy. Nothing here waits for the device: results stay there. On a CPU, rows
that sample are drawn one by one: a batch of rows is too large for the processor's cache.

Legend: R rows, S rows that sample, V tokens of the vocabulary.
"""

import os
import threading
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tita.align.host_device import reads_are_free, send, upload
from tita.align.requests import Sampling
from tita.align.sequence import Sequence

_TINY = np.finfo(np.float32).tiny
_WORD = 2**64 - 1
_MAX_THREADS = 16
_local = threading.local()


@dataclass(slots=True)
class Position:
    """Where a token is to be chosen: after a sequence, and tokens that are drafted for it."""

    sequence: Sequence
    drafts: Items[int] = ()

    @property
    def number(self) -> int:
        """Tokens of the answer before this one."""
        return len(self.sequence.token_ids) + len(self.drafts)


class Workspace:
    """A buffer for scores that is kept between steps, so that a step allocates no other."""

    def __init__(self) -> None:
        self._scores: Tensor | None = None

    def scores(self, num_rows: int, like: Tensor) -> Tensor:
        """An uninitialised tensor[num_rows, V] in float32, which the next call overwrites.

        Args:
            like: [..., V], of the same device.
        """
        width, kept = like.shape[-1], self._scores
        if (
            kept is None
            or kept.device != like.device
            or kept.shape[1] != width
            or len(kept) < num_rows
        ):
            kept = self._scores = like.new_empty((num_rows, width), dtype=torch.float32)
        return kept[:num_rows]


def gumbel(num_tokens: int, *, seed: int, position: int) -> Tensor:
    """Standard Gumbel noise[V] of a seed for the token at a position of its answer, on the CPU."""
    waits = np.empty(num_tokens, np.float32)
    _fill(waits, seed, position)
    return torch.from_numpy(_gumbel_of(waits))


def draw(
    positions: Items[Position], sides: Items[Tensor], workspace: Workspace
) -> list[tuple[Tensor, Tensor]]:
    """The tokens of R positions from scores of one side or several, with the same noise.

    Args:
        positions: R.
        sides: scores[R, V] in float32 each, such as the combined ones and the base model's.
        workspace: the first of the sides may be its scores; they are overwritten.

    Returns:
        Of each side tokens[R], and a mask[R] that is false where no token is possible, or a score
        is NaN.
    """
    if reads_are_free(sides[0].device):
        return _draw_row_by_row(positions, sides)
    draws = _Draws(positions, sides[0])
    return [draws.tokens(side, workspace) for side in sides]


def _draw_row_by_row(
    positions: Items[Position], sides: Items[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """As `draw`, on a CPU: a row that samples stays in the processor's cache."""
    tables = [side.numpy() for side in sides]
    # numpy's argmax is vectorised, torch's is not: 13 times as fast.
    tokens = [table.argmax(-1) for table in tables]
    rows = np.arange(len(positions))
    best = [table[rows, found] for table, found in zip(tables, tokens, strict=True)]
    for row, position in enumerate(positions):
        sampling = position.sequence.sampling
        if not sampling.temperature and sampling.repetition_penalty == 1.0:
            continue
        noise = _RowNoise(position, sides[0].shape[-1])
        for table, found, top in zip(tables, tokens, best, strict=True):
            scores = table[row]
            if sampling.repetition_penalty != 1.0:
                scores = _penalised(scores, position)
                found[row] = scores.argmax()
                top[row] = scores[found[row]]
            if sampling.temperature and np.isfinite(top[row]):
                found[row] = _draw_row(scores - top[row], sampling, noise)
    return [
        (torch.from_numpy(found), torch.from_numpy(np.isfinite(top)))
        for found, top in zip(tokens, best, strict=True)
    ]


class _RowNoise:
    """The noise of one position, made when it is needed."""

    def __init__(self, position: Position, num_tokens: int) -> None:
        self._position = position
        self._num_tokens = num_tokens
        self._waits: Any = None
        self._whole: Any = None

    def whole(self) -> Any:
        """Noise[V]."""
        if self._whole is None:
            self._whole, self._waits = _gumbel_of(self._exponential()), None
        return self._whole

    def of(self, tokens: Any) -> Any:
        """Noise of some tokens, an array."""
        if self._whole is not None:
            return self._whole[tokens]
        return _gumbel_of(self._exponential()[tokens])

    def _exponential(self) -> Any:
        if self._waits is None:
            self._waits = np.empty(self._num_tokens, np.float32)
            _fill(self._waits, self._position.sequence.sampling.seed, self._position.number)
        return self._waits


def _gumbel_of(waits: Any) -> Any:
    """Overwrites exponential variables with Gumbel ones: minus their logarithms."""
    torch.from_numpy(waits).log_().neg_()
    return waits


def _draw_row(scores: Any, sampling: Sampling, noise: _RowNoise) -> int:
    """The token of one row, from scores[V] relative to the maximum, which are overwritten."""
    scores /= sampling.temperature
    tokens = None
    if 0 < sampling.top_k < len(scores):
        floor = torch.from_numpy(scores).topk(sampling.top_k).values[-1].item()
        tokens = np.flatnonzero(scores >= floor)
        scores = scores[tokens]
    probabilities = None
    if sampling.top_p < 1:
        probabilities = torch.from_numpy(scores).softmax(-1).numpy()
    scores += noise.whole() if tokens is None else noise.of(tokens)
    place = _search_nucleus(scores, probabilities, sampling.top_p)
    return place if tokens is None else int(tokens[place])


def _penalised(scores: Any, position: Position) -> Any:
    """A copy of scores[V] with the tokens of prompt and answer less likely."""
    sequence = position.sequence
    prompt = sequence.prepared.inputs["base"]["input_ids"][0].numpy()
    seen = np.concatenate([prompt, [*sequence.token_ids, *position.drafts]]).astype(np.int64)
    scores = scores.copy()
    old, penalty = scores[seen], sequence.sampling.repetition_penalty
    # A token that was seen twice is written twice, with the same value.
    scores[seen] = np.where(old < 0, old * penalty, old / penalty)
    return scores


def _search_nucleus(noisy: Any, probabilities: Any, top_p: float) -> int:
    """The best token of one row, arrays[V], whose likelier tokens have less than top-p together.

    Sorting a vocabulary takes longer than a small model's step. If the best of all is not in the
    nucleus, no less likely token is either, and a pass or two finds the best of the rest.
    """
    tokens = None
    while True:
        best = int(noisy.argmax())
        if probabilities is not None:
            likelier = probabilities > probabilities[best]
        if probabilities is None or probabilities.dot(likelier) < top_p:
            return best if tokens is None else int(tokens[best])
        kept = np.flatnonzero(likelier)
        tokens = kept if tokens is None else tokens[kept]
        noisy, probabilities = noisy[kept], probabilities[kept]


class _Draws:
    """The draws of R positions as tensor operations on a device."""

    def __init__(self, positions: Items[Position], like: Tensor) -> None:
        """Args:
        positions: R.
        like: scores[R, V], for device and number of tokens.
        """
        self._positions = positions
        self._device, self._num_tokens = like.device, like.shape[-1]
        samplings = [each.sequence.sampling for each in positions]
        self._hot = [row for row, each in enumerate(samplings) if each.temperature]
        self._penalties = [each.repetition_penalty for each in samplings]
        self._noise: Tensor | None = None
        if not self._hot:
            return
        hot = [samplings[row] for row in self._hot]
        self._places = None
        if len(hot) < len(positions):
            self._places = upload(self._hot, torch.long, self._device)
        self._temperatures = self._column([each.temperature for each in hot])
        self._top_ks = [each.top_k if each.top_k < self._num_tokens else 0 for each in hot]
        self._top_ps = [each.top_p for each in hot]

    def tokens(self, scores: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """The token of every row of scores[R, V], and whether its scores are numbers."""
        buffer = workspace.scores(len(scores), scores)
        if any(each != 1.0 for each in self._penalties):
            scores = buffer.copy_(scores)
            self._penalise(scores)
        best, tokens = scores.max(-1)
        if not self._hot:
            return tokens, best.isfinite()
        # Relative to the maximum, so that no quotient overflows however low the temperature.
        if self._places is None:
            noisy = torch.sub(scores, best.unsqueeze(-1), out=buffer)
        else:
            noisy = scores[self._places].sub_(best[self._places].unsqueeze(-1))
        noisy.div_(self._temperatures)
        if any(self._top_ks):
            self._keep_top_k(noisy)
        probabilities = noisy.softmax(-1) if min(self._top_ps) < 1 else None
        if self._noise is None:
            self._noise = self._make_noise()
        noisy.add_(self._noise)
        drawn = self._best_in_nucleus(noisy, probabilities)
        if self._places is not None:
            drawn = tokens.index_copy(0, self._places, drawn)
        return drawn, best.isfinite()

    def _penalise(self, scores: Tensor) -> None:
        """Make the tokens of prompt and answer less likely, in place."""
        rows, prompts, answers, counts = [], [], list[int](), list[int]()
        for row, (position, penalty) in enumerate(
            zip(self._positions, self._penalties, strict=True)
        ):
            if penalty != 1.0:
                rows.append(row)
                ids = position.sequence.prepared.inputs["base"]["input_ids"][0]
                prompts.append(ids.to(scores.device, non_blocking=True))
                answers += [*position.sequence.token_ids, *position.drafts]
                counts.append(position.number)
        seen = torch.cat([*prompts, upload(answers, torch.long, scores.device)])
        owners = (
            upload(rows, torch.long, scores.device)
            .repeat(2)
            .repeat_interleave(
                upload([*map(len, prompts), *counts], torch.long, scores.device),
                output_size=len(seen),
            )
        )
        penalties = upload(self._penalties, torch.float32, scores.device)[owners]
        old = scores[owners, seen]
        # A token that was seen twice is written twice, with the same value.
        scores[owners, seen] = torch.where(old < 0, old * penalties, old / penalties)

    def _keep_top_k(self, scores: Tensor) -> None:
        """Rule out all but each row's most likely tokens, in place."""
        tops = scores.topk(max(self._top_ks)).values
        last = upload([max(each - 1, 0) for each in self._top_ks], torch.long, self._device)
        floor = tops.gather(-1, last.unsqueeze(-1))
        if not all(self._top_ks):
            limited = upload([each > 0 for each in self._top_ks], torch.bool, self._device)
            floor = torch.where(limited.unsqueeze(-1), floor, -torch.inf)
        scores.masked_fill_(scores < floor, -torch.inf)

    def _make_noise(self) -> Tensor:
        """Noise[S, V] on the device."""
        host = torch.empty(
            (len(self._hot), self._num_tokens), pin_memory=self._device.type == "cuda"
        )
        where = [self._positions[row] for row in self._hot]
        seeds = [each.sequence.sampling.seed for each in where]
        # The device waits for it. numpy releases the interpreter's lock.
        list(_threads().map(_fill, host.numpy(), seeds, [each.number for each in where]))
        return send(host.log_().neg_(), self._device)

    def _best_in_nucleus(self, noisy: Tensor, probabilities: Tensor | None) -> Tensor:
        """The best of noisy[S, V] whose likelier tokens have less than top-p together."""
        if probabilities is not None:
            ordered = probabilities.sort(-1, descending=True).values
            kept = ordered.cumsum(-1) - ordered < self._column(self._top_ps)
            floor = torch.where(kept, ordered, torch.inf).amin(-1, keepdim=True)
            noisy.masked_fill_(probabilities < floor, -torch.inf)
        return noisy.argmax(-1)

    def _column(self, values: Items[float]) -> Tensor:
        return upload(values, torch.float32, self._device).unsqueeze(-1)


def _fill(waits: Any, seed: int, position: int) -> None:
    """Fill an array[V] with exponential variables, a function of seed and position."""
    if not hasattr(_local, "philox"):
        _local.philox = np.random.Philox()
        _local.generator = np.random.Generator(_local.philox)
    # Philox is counter-based (Salmon et al. 2011): the streams of two counters are independent.
    _local.philox.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array([0, 0, 0, position], np.uint64),
            "key": np.array([seed & _WORD, (seed >> 64) & _WORD], np.uint64),
        },
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    _local.generator.standard_exponential(out=waits, dtype=np.float32)
    # The logarithm of zero would be infinite.
    np.maximum(waits, _TINY, out=waits)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="noise")
