"""What the server's sockets are told."""

import asyncio
import socket

from tita.serve.server import bind


def test_small_pieces_are_sent_at_once():
    async def talk() -> int:
        listener = bind("127.0.0.1", 0, stalled_s=60)
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            told.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await told
            writer.close()
        return found

    assert asyncio.run(talk())
