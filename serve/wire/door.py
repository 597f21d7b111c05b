"""How a listener treats its connections: what a client may send before it is heard, and how long it may take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.wire.errors import ChatError

HEAD_BYTES = 64 << 10
"""The most that a request may send which is no body: its first line, its headers, its trailers."""
MOST_HEADERS = 128
HEAD_SECONDS = 30.0
"""How long the headers of a request may take to arrive where the rest may take longer."""
IDLE_SECONDS = 30
"""How long a connection stays open after an answer, for another request."""
LAST_WORD_SECONDS = 2.0
"""How long a refused client has to read why: its own bytes are thrown away meanwhile."""

MOST_CONNECTIONS = 4096
_RESERVED = 512
"""Descriptors that connections leave for the control socket, the engines, databases and files."""
_MOST_DESCRIPTORS = 1 << 20
"""Some containers allow a thousand times as many, and there are programs that go through them all when they start."""


@dataclass(frozen=True)
class Limits:
    """Of one listener."""

    whole_seconds: float | None = 30.0
    """How long a request may take to arrive; None: only its headers have to be there by then."""
    unread_seconds: float | None = 60.0
    """How long a client may read nothing of an answer that waits for it; None: as long as it likes."""
    connections: int = MOST_CONNECTIONS
    """How many may be open at once."""
    backlog: int = 128
    """How many the kernel keeps, and how many are accepted in one go."""


def limits_by_descriptors() -> Limits:
    """Raise the process's limit of descriptors as far as it may be, and share it out.

    A connection has one more to an engine. So many may have been accepted that have not been counted yet that some
    backlogs have to fit into what is reserved.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    reserved = min(_RESERVED, limit // 2)
    return Limits(connections=min(MOST_CONNECTIONS, max(1, (limit - reserved) // 2)), backlog=max(1, reserved // 4))


class Door(HttpToolsProtocol):
    """One connection. uvicorn's own protocol takes headers of any size, and waits for ever."""

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._unheard = 0
        """Bytes since the parser last came to a body or to the end of something."""
        self._heard = False
        self._in_body = False
        self._headers_seen = 0
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None
        """Set while a request is expected or arrives."""
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "too many connections are open; try again", "too_many_connections", linger=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and not self._refused and not self.transport.is_closing():
            # No further than the limit, so that the parser never holds more than that.
            piece, rest = rest[: HEAD_BYTES - self._unheard], rest[HEAD_BYTES - self._unheard :]
            self._heard = False
            super().data_received(bytes(piece))
            self._unheard = 0 if self._heard else self._unheard + len(piece)
            if self._unheard >= HEAD_BYTES:
                self._refuse(431, f"the headers are larger than {HEAD_BYTES >> 10} KiB", "headers_too_large")
        between = self._deadline is None and (self.cycle is None or self.cycle.response_complete)
        if between and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            # What comes between requests puts the end of an idle connection off, and uvicorn would forget it.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        if self._deadline is None and not self._refused:
            self._expect()
        self._headers_seen = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # A header takes many times its bytes in memory.
        self._headers_seen += 1
        if self._headers_seen <= MOST_HEADERS:
            super().on_header(name, value)
        else:
            self._refuse(431, f"there are more than {MOST_HEADERS} headers", "headers_too_large")

    def on_headers_complete(self) -> None:
        self._heard = True
        if self._refused:
            return
        self._in_body = True
        if self.limits.whole_seconds is None:
            self._arrived()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._heard = True
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._heard = True
        self._in_body = False
        if not self._refused:
            self._arrived()
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.limits.unread_seconds is not None:
            self._unread = self.loop.call_later(self.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "the request is not HTTP", "invalid_request")

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing here is upgraded, and who asks for it need not be logged."""

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(self.limits.whole_seconds or HEAD_SECONDS, self._too_late)

    def _arrived(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._refuse(408, "the request did not arrive in time", "request_timeout")

    def _refuse(self, status: int, message: str, code: str, linger: bool = True) -> None:
        """Say why, listen no more, and close; where an answer has begun, only close.

        `linger`: what the client still sends is thrown away for a moment, or it would not get to read why.
        """
        if self._refused:
            return
        self._refused = True
        self._arrived()
        cycle = self.cycle
        if self.pipeline or (cycle and (cycle.response_started if self._in_body else not cycle.response_complete)):
            self.transport.abort()
            return
        if cycle and self._in_body:
            # Whoever waits for the rest of the request is told that nothing follows.
            cycle.disconnected = True
            cycle.message_event.set()
        self.flow.resume_reading()
        self.transport.write(_refusal(ChatError(status, message, code=code)))
        if linger:
            self.transport.write_eof()
            self._deadline = self.loop.call_later(LAST_WORD_SECONDS, self.transport.abort)
        else:
            self.transport.close()


def _refusal(error: ChatError) -> bytes:
    """The whole answer, for whom no app has heard."""
    body = json.dumps(error.body()).encode()
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if error.status == 503:
        head.append("retry-after: 5")
    return "\r\n".join([*head, "", ""]).encode() + body


class Server(uvicorn.Server):
    """Serves an ASGI app on listening sockets, within `limits`, and leaves signals to its process."""

    def __init__(self, app: object, limits: Limits, grace_seconds: int = 10) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]  # uvicorn's own union of app types is not exported
                http=type("LimitedDoor", (Door,), {"limits": limits}),
                ws="none",
                interface="asgi3",
                log_config=None,
                log_level="error",  # a stranger's bytes are nothing to log
                access_log=False,
                proxy_headers=False,
                lifespan="off",
                backlog=limits.backlog,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=grace_seconds,
                server_header=False,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
