"""The daemon's public socket."""

from __future__ import annotations

import asyncio
import socket

from serve.daemon import _listen_tcp


async def test_no_piece_of_an_answer_is_held_back() -> None:
    """Without TCP_NODELAY a write waits until the one before is acknowledged, which a client may put off for 40 ms."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = _listen_tcp("127.0.0.1", 0)
    async with await asyncio.start_server(serve, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await accepted
        writer.close()
