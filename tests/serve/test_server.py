"""Socket options of the server."""

import asyncio
import socket

import pytest

from tita.errors import TitaError
from tita.serve.server import bind


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
