"""The rate of requests to a server that throttles: how many it answers, and when to send the next.

botocore's retry mode `adaptive` has the same purpose. It cuts the rate once for each of several
requests that are refused together, down to one request in two seconds, and it reacts to single
refusals as to many.
"""

import threading
import time
from collections.abc import Callable

_WINDOW_S = 1.0
_MIN_REFUSED = 2
_MIN_REFUSED_SHARE = 0.1
"""Number and share of refused requests in a window that cut the rate. Servers also refuse single
requests, after which a pause of that request is enough."""
_CUT = 0.8
"""Factor by which the rate is cut, at most once in a window."""
_GROWTH_PER_S = 2.0, 0.1
"""Growth of the rate per second while the server answers: in requests per second, and relative to
the rate; the larger counts."""
_UNLIMITED_AFTER_S = 60.0
"""Time without a refusal after which there is no limit."""
_MIN_RATE = 5.0
"""Below this, the pauses of the requests themselves are enough."""


class RequestRate:
    """Limits the requests of one process per second, once the server has refused one.

    The rate grows slowly, and is cut when the server refuses requests. Processes that share a limit
    of the server approach equal shares.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._window_began = clock()
        self._num_answered = 0
        self._num_refused = 0
        self._answered_per_s = 0.0
        """Requests that succeeded per second of the last window."""
        self._limit: float | None = None
        """Requests per second; None without a limit."""
        self._next_at = 0.0
        """When the next request may be sent."""
        self._refused_at = float("-inf")
        self._cut_at = float("-inf")
        self.last_success = float("-inf")
        """When a request last succeeded."""

    @property
    def answered_per_s(self) -> float:
        """Requests that succeed per second, of the last second or the current one."""
        with self._guard:
            return self._measure(self._clock())

    def reserve(self) -> float:
        """Reserve the next request; the seconds to wait before it is sent."""
        with self._guard:
            now = self._clock()
            if self._limit is not None and now - self._refused_at > _UNLIMITED_AFTER_S:
                self._limit = None
            if self._limit is None:
                return 0.0
            at = max(self._next_at, now)
            self._next_at = at + 1 / self._limit
            return at - now

    def succeeded(self) -> None:
        """Count a request that was answered."""
        with self._guard:
            self.last_success = now = self._clock()
            self._measure(now)
            self._num_answered += 1
            if self._limit is not None:
                # `limit` requests succeed per second.
                absolute, relative = _GROWTH_PER_S
                self._limit += max(absolute / self._limit, relative)

    def refused(self) -> None:
        """Count a request that was throttled."""
        with self._guard:
            self._refused_at = now = self._clock()
            answered = self._measure(now)
            self._num_refused += 1
            share = self._num_refused / (self._num_refused + self._num_answered)
            if self._num_refused < _MIN_REFUSED or share < _MIN_REFUSED_SHARE:
                return
            if now - self._cut_at < _WINDOW_S:
                # Requests that were sent together are refused together.
                return
            self._cut_at = now
            self._limit = max(_CUT * (answered if self._limit is None else self._limit), _MIN_RATE)
            # Forget reservations that were made for long at another rate.
            self._next_at = min(max(self._next_at, now), now + _WINDOW_S)

    def _measure(self, now: float) -> float:
        elapsed_s = now - self._window_began
        if elapsed_s >= _WINDOW_S:
            self._answered_per_s = self._num_answered / elapsed_s
            self._window_began, self._num_answered, self._num_refused = now, 0, 0
            elapsed_s = 0.0
        return max(self._answered_per_s, self._num_answered / _WINDOW_S)
