"""How many prompt tokens may come in between two tokens of running answers.

Chunked prefill (Sarathi, arXiv 2308.16369) bounds a chunk by tokens. What a token costs hangs on
model, machine and all that stands before it, so we bound a chunk by time: `_STEPS` times as long as
a step of writing takes here. What a chunk costs beside its tokens is about what such a step costs,
so most of its time goes into tokens, and a long prompt is not much slower either.
"""

import statistics
from collections import deque

_STEPS = 3.0
_LEAST = 32
"""Tokens of a chunk at least."""


class Pacing:
    """The bound, found from what chunks and steps took of late."""

    def __init__(self, max_tokens: int) -> None:
        """Args:
        max_tokens: of a chunk at most, however fast they go.
        """
        self._max_tokens = max_tokens
        self._num_tokens = float(max_tokens)
        self._steps: deque[float] = deque(maxlen=15)

    @property
    def num_tokens(self) -> int:
        """That the next chunk may have."""
        return int(self._num_tokens)

    def wrote(self, seconds: float) -> None:
        """Every running answer got a token in so many seconds."""
        self._steps.append(seconds)

    def took_in(self, num_tokens: int, seconds: float) -> None:
        """A chunk of so many tokens came in."""
        if not self._steps or seconds <= 0:
            return
        wanted_s = _STEPS * statistics.median(self._steps)
        fitting = num_tokens * wanted_s / seconds
        if seconds > wanted_s:
            # At most by half at a time: one slow chunk may be the machine's fault.
            found = max(min(fitting, self._num_tokens), self._num_tokens / 2)
        elif 2 * num_tokens > self._num_tokens:
            found = max(self._num_tokens, min(fitting, self._num_tokens * 1.25))
        else:
            return  # most of a small chunk's time is not its tokens'
        self._num_tokens = min(max(found, min(_LEAST, self._max_tokens)), self._max_tokens)
