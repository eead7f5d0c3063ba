"""Draws the tokens of a batch: penalties, temperature, top-k, top-p, and seeded noise.

Choosing argmax(log p + g) with g from the standard Gumbel distribution draws from p (the Gumbel-max
trick, arXiv 1611.01144). With g a function of (seed, position) alone, the draw does not depend on
the batch, on the device, or on how many tokens were drafted.

Noise is made on the host, because a device has no generator that gives the same numbers, and goes
to the device in one copy. Nothing here waits for the device: results stay there. On a CPU, rows are
drawn one by one if a batch of them is too large for the processor's cache.

Legend: R rows, S rows that sample, V tokens of the vocabulary.
"""

import math
import os
import threading
from collections.abc import Iterable
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
_CACHED = 2**18
"""Scores that a processor's cache holds beside those that they are made of: 1 MiB."""
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
    return torch.from_numpy(-_log(waits))


def fits_cache(scores: Tensor) -> bool:
    """Whether a processor's cache holds scores[R, V]; a device has no such limit."""
    return scores.numel() <= _CACHED or not reads_are_free(scores.device)


def draw(
    positions: Items[Position], sides: Items[Tensor], workspace: Workspace
) -> list[Tensor] | list[list[int]]:
    """The tokens of R positions from scores of one side or several, with the same noise.

    Args:
        positions: R.
        sides: scores[R, V] in float32 each, such as the combined ones and the base model's.
        workspace: the first of the sides may be its scores; they are overwritten.

    Returns:
        Of each side tokens[R], -1 where no token is possible, or a score is NaN; lists on a CPU.
    """
    if reads_are_free(sides[0].device):
        arrays = [side.numpy() for side in sides]
        if fits_cache(sides[0]) and all(map(_is_plain, positions)):
            return _draw_together(positions, arrays)
        return draw_rows(positions, arrays)
    draws = _Draws(positions, sides[0])
    return [draws.tokens(side, workspace) for side in sides]


def draw_rows(positions: Items[Position], sides: Items[Iterable[Any]]) -> list[list[int]]:
    """As `draw`, on a CPU, where a row stays in the processor's cache until it is drawn.

    Args:
        positions: R.
        sides: the rows of each, arrays[V]; the next row may overwrite one.
    """
    tokens: list[list[int]] = [[] for _ in sides]
    for position, *rows in zip(positions, *sides, strict=True):
        sampling = position.sequence.sampling
        noise = None
        for scores, found in zip(rows, tokens, strict=True):
            if sampling.repetition_penalty != 1.0:
                scores = _penalised(scores, position)
            # numpy's argmax is vectorised, torch's is not: 13 times as fast.
            token = int(scores.argmax())
            best = scores[token]
            if not math.isfinite(best):
                token = -1
            elif sampling.temperature:
                noise = noise or _RowNoise(position, len(scores))
                token = _draw_row(scores - best, sampling, noise)
            found.append(token)
    return tokens


def _is_plain(position: Position) -> bool:
    """Whether a token is drawn from scores as they are, but for the temperature."""
    sampling = position.sequence.sampling
    return sampling.repetition_penalty == 1.0 and sampling.top_p >= 1 and not sampling.top_k


def _draw_together(positions: Items[Position], sides: Items[Any]) -> list[list[int]]:
    """As `draw_rows`, of arrays[R, V], with few operations; for plain positions alone."""
    scores = np.stack(sides)
    best = scores.max(-1, keepdims=True)
    finite = np.isfinite(best)
    temperatures = [each.sequence.sampling.temperature for each in positions]
    if any(temperatures):
        # Rows without a temperature keep their order: their noise is the logarithm of 1.
        waits = np.ones(scores.shape[1:], np.float32)
        for own, position, temperature in zip(waits, positions, temperatures, strict=True):
            if temperature:
                _fill(own, position.sequence.sampling.seed, position.number)
        # The difference of two infinities would be reported.
        scores -= np.where(finite, best, 0)
        scores /= np.array([each or 1 for each in temperatures], np.float32)[:, None]
        scores -= _log(waits)
    found: list[list[int]] = np.where(finite[..., 0], scores.argmax(-1), -1).tolist()
    return found


class _RowNoise:
    """The noise of one position, made when it is needed: logarithms, to be subtracted."""

    def __init__(self, position: Position, num_tokens: int) -> None:
        self._position = position
        self._num_tokens = num_tokens
        self._waits: Any = None
        self._whole: Any = None

    def whole(self) -> Any:
        """Minus the noise[V]."""
        if self._whole is None:
            self._whole, self._waits = _log(self._exponential()), None
        return self._whole

    def of(self, tokens: Any) -> Any:
        """Minus the noise of some tokens, an array."""
        if self._whole is not None:
            return self._whole[tokens]
        return _log(self._exponential()[tokens])

    def _exponential(self) -> Any:
        if self._waits is None:
            self._waits = np.empty(self._num_tokens, np.float32)
            _fill(self._waits, self._position.sequence.sampling.seed, self._position.number)
        return self._waits


def _log(waits: Any) -> Any:
    """The logarithms of exponential variables, in place: standard Gumbel variables, negated."""
    # The logarithm of zero would be infinite.
    np.maximum(waits, _TINY, out=waits)
    torch.from_numpy(waits).log_()
    return waits


def _draw_row(scores: Any, sampling: Sampling, noise: _RowNoise) -> int:
    """The token of one row, from scores[V] relative to the maximum, which are overwritten."""
    if sampling.temperature != 1.0:
        scores /= sampling.temperature
    tokens = None
    if 0 < sampling.top_k < len(scores):
        floor = torch.from_numpy(scores).topk(sampling.top_k).values[-1].item()
        tokens = np.flatnonzero(scores >= floor)
        scores = scores[tokens]
    probabilities = None
    if sampling.top_p < 1:
        probabilities = torch.from_numpy(scores).softmax(-1).numpy()
    scores -= noise.whole() if tokens is None else noise.of(tokens)
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

    def tokens(self, scores: Tensor, workspace: Workspace) -> Tensor:
        """The token of every row of scores[R, V], -1 where they are no numbers."""
        buffer = workspace.scores(len(scores), scores)
        if any(each != 1.0 for each in self._penalties):
            scores = buffer.copy_(scores)
            self._penalise(scores)
        best, tokens = scores.max(-1)
        if not self._hot:
            return torch.where(best.isfinite(), tokens, -1)
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
        noisy.sub_(self._noise)
        drawn = self._best_in_nucleus(noisy, probabilities)
        if self._places is not None:
            drawn = tokens.index_copy(0, self._places, drawn)
        return torch.where(best.isfinite(), drawn, -1)

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
        """Minus the noise[S, V], on the device."""
        host = torch.empty(
            (len(self._hot), self._num_tokens), pin_memory=self._device.type == "cuda"
        )
        where = [self._positions[row] for row in self._hot]
        seeds = [each.sequence.sampling.seed for each in where]
        # The device waits for it. numpy releases the interpreter's lock.
        list(_threads().map(_fill, host.numpy(), seeds, [each.number for each in where]))
        _log(host.numpy())
        return send(host, self._device)

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


class _Exponentials:
    """A source of exponential variables for one thread.

    Philox is counter-based (Salmon et al. 2011): the streams of two counters are independent.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox()
        self._generator = np.random.Generator(self._philox)
        self._counter, self._key = np.zeros(4, np.uint64), np.zeros(2, np.uint64)
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def fill(self, waits: Any, seed: int, position: int) -> None:
        """Fill an array[V] with variables that are a function of seed and position."""
        self._counter[3] = position
        self._key[0], self._key[1] = seed & _WORD, (seed >> 64) & _WORD
        self._philox.state = self._state
        self._generator.standard_exponential(out=waits, dtype=np.float32)


def _fill(waits: Any, seed: int, position: int) -> None:
    """As `_Exponentials.fill`, in any thread."""
    try:
        source: _Exponentials = _local.exponentials
    except AttributeError:
        source = _local.exponentials = _Exponentials()
    source.fill(waits, seed, position)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="noise")
