"""Socket options of the server, and how signals end it."""

import asyncio
import signal
import socket
import time

import pytest

from tita.errors import TitaError
from tita.serve.async_engine import AsyncEngine
from tita.serve.serve_options import ServeOptions
from tita.serve.server import InferenceServer, bind


def test_small_chunks_are_sent_at_once():
    async def talk() -> int:
        listener = bind("127.0.0.1", 0, send_timeout_s=60)
        option: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            option.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await option
            writer.close()
        return found

    assert asyncio.run(talk())


@pytest.mark.parametrize(
    ("host", "where"), [("::1", "[::1]:70000"), ("127.0.0.1", "127.0.0.1:70000")]
)
def test_an_address_that_is_not_available_is_named_as_in_a_url(host: str, where: str):
    with pytest.raises(TitaError) as refused:
        bind(host, 70_000, send_timeout_s=60)
    assert refused.value.where == where


def test_each_signal_waits_for_less(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AsyncEngine, "num_requests", 1)
    server = InferenceServer(ServeOptions(grace_s=3600), host="127.0.0.1", port=0)
    server.handle_exit(signal.SIGTERM, None)
    time.sleep(0.3)
    assert not server.should_exit, "it waits for the request"
    server.handle_exit(signal.SIGINT, None)
    ends = time.monotonic() + 60
    while not server.should_exit and time.monotonic() < ends:
        time.sleep(0.01)
    assert server.should_exit
    assert not server.force_exit, "it waits for connections"
    server.handle_exit(signal.SIGTERM, None)
    assert server.force_exit
