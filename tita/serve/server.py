"""The server process: answers probes while the models load, and drains requests on SIGTERM."""

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from tita.errors import ExitCode, TitaError
from tita.serve.app import create_app
from tita.serve.async_engine import AsyncEngine
from tita.serve.connections import ConnectionConfig, ConnectionLimits, bound_logging
from tita.serve.model_loading import LoadedModels
from tita.serve.serve_options import ServeOptions
from tita.terminal import say

_BACKLOG = 2048
"""Connections that wait in the kernel to be accepted."""
_SEND_TIMEOUT_S = 60.0
"""Time after which a client that reads nothing is disconnected, or the deadline if shorter."""
_SWITCH_INTERVAL_S = 0.0005
"""A tenth of the interpreter's own."""


class InferenceServer(uvicorn.Server):
    """uvicorn with a longer shutdown: reject new requests, finish running ones, then stop."""

    def __init__(self, options: ServeOptions, *, host: str, port: int) -> None:
        """Port 0 is any free port, which is printed on standard error."""
        # Each place in the queue may download an image.
        num_reserved = options.num_places if options.image_hosts else 0
        limits = ConnectionLimits.of_this_process(num_reserved=num_reserved)
        options = limits.fit_queue(options)
        self._engine = AsyncEngine(options)
        self._load_error: BaseException | None = None
        self._aborts = False
        """Whether running requests are no longer waited for."""
        super().__init__(
            ConnectionConfig(
                create_app(self._engine),
                header_timeout_s=options.header_timeout_s,
                limits=limits,
                host=host,
                port=port,
                loop="uvloop",
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=10,
                timeout_keep_alive=75,
            )
        )

    def run_until_drained(self, load_models: Callable[[], LoadedModels]) -> ExitCode:
        """Serve until SIGTERM or Ctrl-C; `load_models` runs in a thread beside the probes.

        Raises:
            TitaError: a model cannot be loaded, or the address is in use.
        """
        send_timeout_s = min(_SEND_TIMEOUT_S, self._engine.options.deadline_s)
        listener = bind(self.config.host, self.config.port, send_timeout_s=send_timeout_s)
        address, port = listener.getsockname()[:2]
        # A step of the models takes the interpreter's lock hundreds of times, and waits this long
        # for it whenever the event loop is busy, for example with the bodies of photographs.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        # uvicorn installs its handlers when it runs; a signal may arrive before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        # From here on, early connections wait in the backlog until uvicorn accepts them.
        listener.listen(_BACKLOG)
        bound_logging()
        say(f"tita serve: listening on http://{_with_port(address, port)}")

        def load() -> None:
            try:
                self._engine.load(load_models())
                # Libraries and models stay. Otherwise each full collection of garbage goes through
                # all their objects, while every request waits.
                gc.collect()
                gc.freeze()
            except BaseException as error:
                self._load_error = error
                self.should_exit = True

        loader = threading.Thread(target=load, name="loader", daemon=True)
        loader.start()
        try:
            self.run(sockets=[listener])
        finally:
            self._engine.stop()
            listener.close()
        loader.join(timeout=1)
        if loader.is_alive():
            # Python aborts if it exits while a daemon thread is in native code.
            logging.shutdown()
            sys.stderr.flush()
            os._exit(ExitCode.OK)
        if self._load_error is not None:
            raise self._load_error
        return ExitCode.OK

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # uvicorn has reduced it to what asyncio accepts at a time.
        for listener in sockets or []:
            listener.listen(_BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts draining, the second ends it, the third stops the server."""
        name = signal.Signals(sig).name
        if self._aborts:
            self.should_exit = self.force_exit = True
            return
        if self._engine.draining:
            self._aborts = True
            say(f"tita serve: {name} received again, aborting running requests")
            return
        self._engine.draining = True
        # A signal handler must not take locks; it only starts a thread.
        say(f"tita serve: {name} received, finishing running requests")
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        ends = time.monotonic() + self._engine.options.grace_s
        # A request that passed the middleware may still be sending its body, so check twice.
        num_idle = 0
        while num_idle < 2 and not self._aborts and time.monotonic() < ends:
            num_idle = 0 if self._engine.num_requests else num_idle + 1
            time.sleep(0.1)
        self._aborts = True
        self._engine.stop()
        self.should_exit = True


def bind(host: str, port: int, *, send_timeout_s: float) -> socket.socket:
    """A bound socket that does not listen yet; port 0 is any free port.

    After `send_timeout_s` the kernel closes a connection whose client acknowledges nothing
    (RFC 5482), which frees its send buffer. Linux only.

    Raises:
        TitaError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY, which sends small chunks at once, only on sockets with a protocol.
    listener: socket.socket | None = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            timeout_ms = int(1000 * send_timeout_s)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        what = getattr(error, "strerror", None) or str(error)
        raise TitaError(
            what.lower(), where=_with_port(host, port), remedy="choose another --host or --port"
        ) from None
    return listener


def _with_port(host: str, port: int) -> str:
    """A host and its port as in a URL, where an IPv6 address has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
