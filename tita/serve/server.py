"""The server as a process: loading beside the first probes, and leaving on SIGTERM."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from tita.errors import ExitCode, TitaError
from tita.serve.app import create_app
from tita.serve.async_engine import AsyncEngine
from tita.serve.loading import LoadedModels
from tita.serve.options import ServeOptions
from tita.terminal import say

_STALLED_S = 60.0
"""That a client may take in nothing of what it is sent, or as long as an answer may take at all."""


def serve(
    options: ServeOptions,
    *,
    load: Callable[[], LoadedModels],
    host: str,
    port: int,
) -> ExitCode:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        options: how.
        load: loads the models; called in a thread, while probes are answered already.
        host: address to listen on.
        port: 0 for any free one; it is told on standard error.

    Raises:
        TitaError: a model could not be loaded, or the port is taken.
    """
    serving = AsyncEngine(options)
    server = _Server(serving, host=host, port=port)
    return server.run_until_left(load)


class _Server(uvicorn.Server):
    """uvicorn with a slower farewell: refuse new requests, finish running ones, then stop."""

    def __init__(self, serving: AsyncEngine, *, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(serving),
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=10,
                timeout_keep_alive=75,
            )
        )
        self._serving = serving
        self._stalled_s = min(_STALLED_S, serving.options.deadline_s)
        self._failure: BaseException | None = None

    def run_until_left(self, load_models: Callable[[], LoadedModels]) -> ExitCode:
        listener = bind(self.config.host, self.config.port, stalled_s=self._stalled_s)
        address, port = listener.getsockname()[:2]
        # uvicorn takes the signals only once it runs, and we may be asked to leave before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        # From the line below on nobody is turned away: what comes early waits for uvicorn.
        listener.listen(self.config.backlog)
        say(f"tita serve: listening on http://{address}:{port}")

        def load() -> None:
            try:
                self._serving.load(load_models())
            except BaseException as error:
                self._failure = error
                self.should_exit = True

        threading.Thread(target=load, name="loader", daemon=True).start()
        try:
            self.run(sockets=[listener])
        finally:
            self._serving.stop()
            listener.close()
        if self._failure is not None:
            raise self._failure
        return ExitCode.OK

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the farewell, the second ends it at once."""
        if self._serving.draining:
            self.should_exit = self.force_exit = True
            return
        self._serving.draining = True
        # No lock is taken here: this runs between two lines of the main thread.
        say(f"tita serve: {signal.Signals(sig).name}; running answers have a last word")
        threading.Thread(target=self._leave, name="farewell", daemon=True).start()

    def _leave(self) -> None:
        ends = time.monotonic() + self._serving.options.grace_s
        # A request that has passed the gate may still be sending its body: look twice.
        quiet = 0
        while quiet < 2 and time.monotonic() < ends:
            quiet = 0 if self._serving.num_requests else quiet + 1
            time.sleep(0.1)
        self._serving.stop()
        self.should_exit = True


def bind(host: str, port: int, *, stalled_s: float) -> socket.socket:
    """A socket on that address, which does not listen yet.

    Args:
        host: address.
        port: 0 for any free one.
        stalled_s: seconds after which the kernel gives up a client that takes in nothing of what
            it is sent (RFC 5482); what is kept for it is free then. Linux only.

    Raises:
        TitaError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only on sockets that name their protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * stalled_s))
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        what = getattr(error, "strerror", None) or str(error)
        raise TitaError(
            what.lower(), where=f"{host}:{port}", remedy="choose another --host or --port"
        ) from None
    return listener
