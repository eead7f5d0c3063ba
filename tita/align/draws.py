"""Draws the tokens of a batch: penalties, temperature, top-k, top-p, and seeded noise.

Choosing argmax(log p + g) with g from the standard Gumbel distribution draws from p (the Gumbel-max
trick, arXiv 1611.01144). With g a function of (seed, position) alone, the draw does not depend on
the batch, on the device, or on how many tokens were drafted.

Noise is made on the host, because a device has no generator that gives the same numbers, and goes
to the device in one copy. Nothing here waits for the device: results stay there.

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
from tita.align.sequence import Sequence

_TINY = np.finfo(np.float32).tiny
_WORD = 2**64 - 1
_MAX_THREADS = 16
_local = threading.local()


@dataclass(frozen=True, slots=True)
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
    waits = torch.empty(num_tokens)
    _fill(waits.numpy(), seed, position)
    # Minus the logarithm of an exponential variable is a Gumbel one.
    return waits.log_().neg_()


class Draws:
    """The draws of R positions, from the combined scores and from the base model's alone.

    Both get the same noise, which is made once.
    """

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

    @property
    def overwrite(self) -> bool:
        """Whether `tokens` writes to its buffer."""
        return bool(self._hot) or any(each != 1.0 for each in self._penalties)

    def tokens(self, scores: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The token of every row, and whether its scores are numbers.

        Args:
            scores: [R, V] in float32; not modified, unless they are the buffer.
            buffer: [R, V]; overwritten.

        Returns:
            tokens[R], and a mask[R] that is false where no token is possible, or one is NaN.
        """
        if any(each != 1.0 for each in self._penalties):
            scores = scores if scores is buffer else buffer.copy_(scores)
            self._penalise(scores)
        tokens, best = _best(scores)
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
        table = host.numpy()
        where = [self._positions[row] for row in self._hot]
        seeds = [each.sequence.sampling.seed for each in where]
        numbers = [each.number for each in where]
        if reads_are_free(self._device):
            for each in zip(table, seeds, numbers, strict=True):
                _fill(*each)
        else:
            # The device waits for it. numpy releases the interpreter's lock.
            list(_threads().map(_fill, table, seeds, numbers))
        return send(host.log_().neg_(), self._device)

    def _best_in_nucleus(self, noisy: Tensor, probabilities: Tensor | None) -> Tensor:
        """The best of noisy[S, V] whose likelier tokens have less than top-p together."""
        if probabilities is None:
            return _best(noisy)[0]
        if reads_are_free(self._device):
            rows = zip(noisy.numpy(), probabilities.numpy(), self._top_ps, strict=True)
            return torch.tensor([_search_nucleus(*each) for each in rows])
        ordered = probabilities.sort(-1, descending=True).values
        kept = ordered.cumsum(-1) - ordered < self._column(self._top_ps)
        floor = torch.where(kept, ordered, torch.inf).amin(-1, keepdim=True)
        return _best(noisy.masked_fill_(probabilities < floor, -torch.inf))[0]

    def _column(self, values: Items[float]) -> Tensor:
        return upload(values, torch.float32, self._device).unsqueeze(-1)


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token[R] of scores[R, V], and its score[R]; NaN where a row has one."""
    if not reads_are_free(scores.device):
        values, tokens = scores.max(-1)
        return tokens, values
    # numpy's argmax is vectorised, torch's is not: 13 times as fast.
    tokens = torch.from_numpy(scores.numpy().argmax(-1))
    return tokens, scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _search_nucleus(noisy: Any, probabilities: Any, top_p: float) -> int:
    """The best token of one row, arrays[V].

    Sorting a vocabulary takes longer than a small model's step. If the best of all is not in the
    nucleus, no less likely token is either, and a pass or two finds the best of the rest.
    """
    tokens = None
    while True:
        best = noisy.argmax()
        likelier = probabilities > probabilities[best]
        if top_p >= 1 or probabilities.dot(likelier) < top_p:
            return int(best if tokens is None else tokens[best])
        kept = likelier.nonzero()[0]
        tokens = kept if tokens is None else tokens[kept]
        noisy, probabilities = noisy[kept], probabilities[kept]


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
