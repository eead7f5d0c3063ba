"""Waits until an endpoint is ready, so that questions are not wasted on a server that starts."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import httpx

from tita.activity import stage
from tita.bench.endpoint import EndpointUnavailable, http_get
from tita.bench.registry import ModelEndpoint
from tita.errors import TitaError
from tita.terminal import say

_PROBE_TIMEOUT_S = 10.0
_PAUSE_S = 2.0
_REPORT_EVERY_S = 60.0


def wait_until_ready(endpoint: ModelEndpoint, *, timeout_s: float) -> None:
    """Wait until `GET /models` of an endpoint succeeds; the wait is reported.

    An endpoint that does not have the list counts as ready.

    Raises:
        EndpointUnavailable: it is not ready within `timeout_s`, or SIGTERM was received.
        TitaError: the endpoint rejects the API key.
    """
    started, reported = time.monotonic(), None
    reason = not_ready_reason(endpoint)
    with (
        stage("waiting for the inference server"),
        _unavailable_on_sigterm(endpoint, started=started),
    ):
        while reason:
            waited = time.monotonic() - started
            if waited >= timeout_s:
                raise EndpointUnavailable(
                    f"not ready after {waited:.0f} s ({reason})",
                    where=endpoint.base_url,
                    remedy="check the server with `tita doctor`, or raise wait_ready_s",
                )
            if reported is None or waited - reported >= _REPORT_EVERY_S:
                say(f"waiting for {endpoint.base_url}: {reason} ({timeout_s - waited:.0f} s left)")
                reported = waited
            time.sleep(min(_PAUSE_S, max(0.0, timeout_s - waited)))
            reason = not_ready_reason(endpoint)
    if reported is not None:
        say(f"{endpoint.base_url} is ready after {time.monotonic() - started:.0f} s")


def not_ready_reason(endpoint: ModelEndpoint) -> str:
    """Why an endpoint does not answer now; empty if it is ready.

    Raises:
        TitaError: the endpoint rejects the API key.
    """
    url = f"{endpoint.base_url}/models"
    try:
        status = http_get(url, key=endpoint.key, timeout_s=_PROBE_TIMEOUT_S).status_code
    except httpx.RequestError as error:
        return str(error) or type(error).__name__
    except httpx.InvalidURL as error:
        raise TitaError(f"invalid URL ({error})", where=endpoint.base_url) from None
    if status in (401, 403):
        raise TitaError(
            f"the endpoint rejects the API key (HTTP {status})",
            where=endpoint.base_url,
            remedy="check the key",
        )
    return f"HTTP {status}" if status == 429 or (status >= 500 and status != 501) else ""


@contextlib.contextmanager
def _unavailable_on_sigterm(endpoint: ModelEndpoint, *, started: float) -> Iterator[None]:
    """While waiting, SIGTERM (at a deadline) names the server that is away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        waited = time.monotonic() - started
        raise EndpointUnavailable(
            f"SIGTERM received while waiting for the server, not ready for {waited:.0f} s",
            where=endpoint.base_url,
            remedy="check the server with `tita doctor`",
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
