"""HTTP connections: bounded in number, and in the time until their request's headers are there.

uvicorn bounds neither; its option `http` takes the protocol that does. A connection that waits for
headers, or else one that waits for the rest of a body, makes room for a new one. Those of complete
requests are bounded by the queue, so health probes are answered whatever clients do.
"""

import asyncio
import logging
import resource
import time
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tita.serve.serve_options import ServeOptions

logger = logging.getLogger(__name__)

_OTHER_FILES = 48
"""Open files of the process that are no connections: pipes, sockets of the store, libraries."""
_MAX_CONNECTIONS = 4096
_TICKS = 4
"""Ticks of the event loop from accepting a connection to having closed the one it replaces."""
_PROBES = 16
"""Connections that are left for probes, metrics and refusals while the queue is full."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections the process may hold, and accept in one tick of its event loop."""

    max_connections: int
    num_accepted: int

    @classmethod
    def of_this_process(cls, *, num_reserved: int) -> "ConnectionLimits":
        """The limits that follow from that of open files.

        Args:
            num_reserved: open files that the process may need beside connections.
        """
        num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # asyncio accepts as many connections as the backlog in each tick, and logs a traceback for
        # each that it has no file for.
        num_accepted = min(max(num_files // 16, 4), 64)
        left = num_files - _OTHER_FILES - _TICKS * num_accepted - num_reserved
        return cls(min(max(left, 16), _MAX_CONNECTIONS), num_accepted)

    def fit_queue(self, options: ServeOptions) -> ServeOptions:
        """The options with a queue that leaves connections for probes."""
        places = max(options.max_batch, self.max_connections - _PROBES)
        if options.num_places <= places:
            return options
        max_waiting = places - options.max_batch
        logger.warning(
            "the limit of open files allows %d connections, so %d requests wait at most, not %d; "
            "raise it with `ulimit -n`",
            *(self.max_connections, max_waiting, options.max_waiting),
        )
        return replace(options, max_waiting=max_waiting)


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration, and the bounds on connections, with those that are open."""

    def __init__(
        self, app: Any, *, header_timeout_s: float, limits: ConnectionLimits, **options: Any
    ) -> None:
        """`header_timeout_s`: a connection is closed if its request's headers take longer."""
        super().__init__(app, http=BoundedProtocol, backlog=limits.num_accepted, **options)
        self.max_connections = limits.max_connections
        self.header_timeout_s = header_timeout_s
        self.open: set[BoundedProtocol] = set()
        self.waiting: dict[BoundedProtocol, None] = {}
        """Open connections without a running request, the oldest first."""
        self.receiving: dict[BoundedProtocol, None] = {}
        """Open connections with a request whose body has not arrived, the oldest first."""

    def make_room(self, new: "BoundedProtocol") -> None:
        """Close a connection for a new one, if there are too many."""
        num_too_many = len(self.open) - self.max_connections
        if num_too_many <= 0:
            return
        others = (each for each in chain(self.waiting, self.receiving) if each is not new)
        oldest = next(others, None)
        if oldest is None and num_too_many <= _PROBES:
            return
        logger.warning(
            "more than %d connections; one without a complete request is closed",
            self.max_connections,
        )
        (oldest or new).abort()


class BoundedProtocol(H11Protocol):
    """One connection of a server with a `ConnectionConfig`."""

    config: ConnectionConfig
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        config = self.config
        config.open.add(self)
        config.waiting[self] = None
        self._start_header_timer()
        config.make_room(self)

    def data_received(self, data: bytes) -> None:
        if self in self.config.waiting:
            self._start_header_timer()
        super().data_received(data)
        if self._is_running:
            self._stop_waiting()
            assert self.cycle is not None
            if self.cycle.more_body:
                self.config.receiving[self] = None
            else:
                self.config.receiving.pop(self, None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.config.receiving.pop(self, None)
        # With pipelining, the next request may be running already.
        if self in self.config.open and not self._is_running:
            self.config.waiting[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.config.receiving.pop(self, None)
        self.config.open.discard(self)
        super().connection_lost(exc)

    @property
    def _is_running(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = asyncio.get_running_loop().call_later(
                self.config.header_timeout_s, self.abort
            )

    def _stop_waiting(self) -> None:
        self.config.waiting.pop(self, None)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def abort(self) -> None:
        """Close the connection at once."""
        self._stop_waiting()
        self.config.receiving.pop(self, None)
        # The transport closes later, and must not count until then.
        self.config.open.discard(self)
        self.transport.abort()


class RepeatFilter(logging.Filter):
    """Logs each message a few times a minute, and then how often it was left out.

    A client can cause any number of some messages: of uvicorn about what is no HTTP, and of asyncio
    about sockets, each with a traceback.
    """

    def __init__(self, *, num_repeats: int = 5, period_s: float = 60.0) -> None:
        super().__init__()
        self._num_repeats = num_repeats
        self._period_s = period_s
        self._began = 0.0
        self._counts: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        key = (record.name, str(record.msg).partition("\n")[0])
        if now - self._began > self._period_s:
            left_out = self._counts.get(key, 0) - self._num_repeats
            if left_out > 0:
                record.msg = f"{record.msg} ({left_out} more in the minute before)"
            self._began, self._counts = now, {}
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key] <= self._num_repeats


def bound_logging() -> None:
    """Bound what clients can cause to be logged by the event loop, uvicorn and this module."""
    for name in ("asyncio", "uvicorn.error", __name__):
        found = logging.getLogger(name)
        if not any(isinstance(each, RepeatFilter) for each in found.filters):
            found.addFilter(RepeatFilter())
