"""What a client may send before it is heard, and how long it may take, on real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.wire import door
from serve.wire.asgi import ClientGone, Reply, read_body, until_gone
from serve.wire.door import HEAD_BYTES, MOST_HEADERS, Limits, Server

GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class App:
    """Answers every request with its body's size, a stream without end at /stream, and /early before the body."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.bodies: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, {})
        if scope["path"] == "/early":
            await reply.json(401, {})
            return
        if scope["path"] == "/stream":
            await read_body(receive, 0)
            await until_gone(receive, self._stream(reply))
            self.gone.set()
            return
        try:
            self.bodies.append(len(await read_body(receive, 1 << 30)))
            await reply.json(200, self.bodies[-1])
        except ClientGone:
            self.gone.set()

    async def _stream(self, reply: Reply) -> None:
        while True:
            await reply.events(b"data: " + b"x" * 60_000 + b"\n\n")
            await asyncio.sleep(0)


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def connect(app: App) -> AsyncIterator[Connect]:
    """Open a connection to the app behind a door with such limits."""
    running: list[tuple[Server, asyncio.Task[None]]] = []
    ports: dict[Limits, int] = {}
    writers: list[asyncio.StreamWriter] = []

    async def connect(**limits: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        wanted = Limits(**limits)
        if wanted not in ports:
            listener = socket.socket(proto=socket.IPPROTO_TCP)
            listener.bind(("127.0.0.1", 0))
            server = Server(app, wanted, grace_seconds=0)
            running.append((server, asyncio.create_task(server.serve([listener]))))
            while not server.started:
                await asyncio.sleep(0.01)
            ports[wanted] = listener.getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", ports[wanted])
        writers.append(writer)
        return reader, writer

    yield connect
    for writer in writers:
        writer.close()
    for server, task in running:
        task.cancel()
        for listener in server.servers:
            listener.close()
        for request in server.server_state.tasks:
            request.cancel()
    await asyncio.gather(*(task for _, task in running), return_exceptions=True)


async def answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """Status and JSON of the next answer."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def closed(reader: asyncio.StreamReader) -> None:
    """Until the server has closed the connection."""
    with contextlib.suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(1 << 20), 30):
            pass


@pytest.mark.parametrize(
    "more",
    [b"A:\r\n" * HEAD_BYTES, b"x-long: " + b"x" * (2 * HEAD_BYTES), b"A: b\r\n" * (MOST_HEADERS + 1)],
    ids=["lines", "one line", "many"],
)
async def test_headers_without_end_are_refused(connect: Connect, more: bytes) -> None:
    reader, writer = await connect()
    writer.write(GET + more)
    status, said = await answer(reader)
    assert (status, said["error"]["code"]) == (431, "headers_too_large")
    await closed(reader)


async def test_a_path_without_end_is_refused(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"GET /" + b"x" * (2 * HEAD_BYTES))
    assert (await answer(reader))[0] == 431


async def test_the_parser_never_holds_more_than_the_limit(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that goes on sending after it was refused is not listened to."""
    monkeypatch.setattr(door, "LAST_WORD_SECONDS", 0.2)
    fed: list[int] = []
    feed = HttpToolsProtocol.data_received

    def counted(protocol: HttpToolsProtocol, data: bytes) -> None:
        fed.append(len(data))
        feed(protocol, data)

    monkeypatch.setattr(HttpToolsProtocol, "data_received", counted)
    reader, writer = await connect()
    writer.write(GET + b"x-long: ")
    with contextlib.suppress(ConnectionError):
        while not reader.at_eof():
            writer.write(b"x" * 65536)
            await asyncio.wait_for(writer.drain(), 30)
    assert sum(fed) == HEAD_BYTES


async def test_what_fits_is_heard_and_a_body_is_no_header(connect: Connect, app: App) -> None:
    reader, writer = await connect()
    for size in (0, 10, 3 * HEAD_BYTES + 7, HEAD_BYTES, 20 * HEAD_BYTES):
        head = b"POST / HTTP/1.1\r\nhost: x\r\nx-pad: " + b"p" * (HEAD_BYTES - 200)
        writer.write(head + b"\r\ncontent-length: %d\r\n\r\n" % size + b"b" * size)
        assert await answer(reader) == (200, size)
    writer.write(b"".join(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n123456789" for _ in range(4)))
    assert [await answer(reader) for _ in range(4)] == [(200, 9)] * 4, "also where many come in one piece"


async def test_trailers_without_end_are_refused(connect: Connect, app: App) -> None:
    reader, writer = await connect()
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
    writer.write(b"A: b\r\n" * HEAD_BYTES)
    assert (await answer(reader))[0] == 431
    await asyncio.wait_for(app.gone.wait(), 30)
    assert app.bodies == []


@pytest.mark.parametrize(
    "sent", [b"", GET, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1234"], ids=["nothing", "head", "body"]
)
async def test_a_request_that_does_not_arrive_is_given_up(connect: Connect, app: App, sent: bytes) -> None:
    reader, writer = await connect(whole_seconds=0.3)
    writer.write(sent)
    status, said = await answer(reader)
    assert (status, said["error"]["code"]) == (408, "request_timeout")
    await closed(reader)
    if b"POST" in sent:
        await asyncio.wait_for(app.gone.wait(), 30)


async def test_a_second_request_has_its_time_too(connect: Connect) -> None:
    reader, writer = await connect(whole_seconds=0.3)
    writer.write(GET + b"\r\n")
    assert (await answer(reader))[0] == 200
    writer.write(GET)
    assert (await answer(reader))[0] == 408


async def test_who_is_answered_before_the_end_of_its_body_is_not_waited_for(connect: Connect) -> None:
    reader, writer = await connect(whole_seconds=0.3)
    writer.write(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1234")
    assert (await answer(reader))[0] == 401
    assert await asyncio.wait_for(reader.read(), 30) == b""


async def test_nothing_is_said_in_the_midst_of_an_answer(connect: Connect, app: App) -> None:
    """A second request that stays half, sent behind one that is being answered."""
    reader, writer = await connect(whole_seconds=0.3)
    writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\nPOST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1")
    said = b""
    with contextlib.suppress(ConnectionError):
        while part := await asyncio.wait_for(reader.read(1 << 20), 30):
            said = said[-100:] + part
            assert b"408" not in said
    assert b"request_timeout" not in said


async def test_an_upload_may_take_its_time_where_only_headers_have_to_come(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.3)
    reader, writer = await connect(whole_seconds=None)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n")
    for _ in range(4):
        await asyncio.sleep(0.15)
        writer.write(b"x")
    assert await answer(reader) == (200, 4)
    reader, writer = await connect(whole_seconds=None)
    writer.write(GET)
    assert (await answer(reader))[0] == 408


async def test_idle_connections_are_closed(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where empty lines come in the place of a request."""
    monkeypatch.setattr(door, "IDLE_SECONDS", 1)
    for more in (b"", b"\r\n"):
        reader, writer = await connect()
        writer.write(GET + b"\r\n")
        assert (await answer(reader))[0] == 200
        writer.write(more)
        await closed(reader)


async def test_a_client_that_does_not_read_is_given_up(connect: Connect, app: App) -> None:
    reader, writer = await connect(unread_seconds=0.3)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
    await asyncio.wait_for(app.gone.wait(), 30)


async def test_above_the_cap_connections_are_refused_and_below_it_taken_again(connect: Connect) -> None:
    kept = [await connect(connections=2) for _ in range(2)]
    for _ in range(3):
        refused, _ = await connect(connections=2)
        assert (await answer(refused))[0] == 503
        await closed(refused)
    kept[0][1].close()
    async with asyncio.timeout(30):
        while True:
            reader, writer = await connect(connections=2)
            writer.write(GET + b"\r\n")
            if (await answer(reader))[0] == 200:
                break


async def test_nothing_is_upgraded(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(GET + b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\r\n")
    assert await answer(reader) == (200, 0)


async def test_what_is_no_http_is_refused_in_the_one_shape(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"hello\r\n\r\n")
    status, said = await answer(reader)
    assert (status, said["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(("hard", "connections"), [(256, 64), (1024, 256), (4096, 1792), (65536, 4096)])
def test_connections_leave_descriptors_for_the_others(hard: int, connections: int) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("this machine allows fewer")
    code = (
        "import resource; from serve.wire.door import limits_by_descriptors as f;"
        f" resource.setrlimit(resource.RLIMIT_NOFILE, (128, {hard})); x = f();"
        " print(x.connections, x.backlog, resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found, backlog, soft = map(int, printed.split())
    assert (found, soft) == (connections, hard)
    assert 2 * found + 3 * backlog + 30 < hard
