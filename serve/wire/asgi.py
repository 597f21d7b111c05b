"""The little of HTTP that the gateway and the embedded engine share, straight on ASGI."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.types import Receive, Send

from serve.wire.errors import ChatError

Headers = list[tuple[bytes, bytes]]

MOST_VALUES = 50_000
"""Values in a request: a conversation of four megabytes has some thousand, and a million of them take seconds."""
_PARSED_AT_ONCE = 64 << 10
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)', re.DOTALL)

_EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client left before it had said what it wants."""


async def read_body(receive: Receive, limit: int) -> bytes:
    """The request's body. Raises ChatError above `limit` bytes, and ClientGone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise ChatError(413, f"the request is larger than {limit >> 10} KiB", code="request_too_large")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def read_json(receive: Receive, limit: int) -> dict[str, Any]:
    """The JSON object that the request's body is. Raises ChatError, and ClientGone."""
    body = await read_body(receive, limit)
    return parse_json(body) if len(body) <= _PARSED_AT_ONCE else await asyncio.to_thread(parse_json, body)


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises ChatError."""
    # Python does nothing else while it parses, in whichever thread: what bounds the time is how much there is to parse.
    if _too_many_values(body):
        raise ChatError(400, f"the request has more than {MOST_VALUES} values", code="too_many_values")
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ChatError(400, f"the request is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ChatError(400, "the request is not a JSON object", code="invalid_json")
    return value


def _too_many_values(body: bytes) -> bool:
    """Whether JSON holds more values than MOST_VALUES, commas and brackets within its texts left out of the count."""
    if _marks(body) <= MOST_VALUES:
        return False
    return body.count(b'"') - body.count(b'\\"') > 2 * MOST_VALUES or _marks(_STRING.sub(b"", body)) > MOST_VALUES


def _marks(body: bytes) -> int:
    """How many marks there are of which one comes before each value."""
    return sum(body.count(mark) for mark in (b",", b"[", b"{"))


async def until_gone(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Run `answering`, and cancel it as soon as the client is gone. The request's body must have been read."""
    answer = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.wait((answer, gone))
    if not answer.cancelled():
        answer.result()


class Reply:
    """The answer to one request: a JSON document, or a stream of server-sent events.

    `status`: what the client was told, 0 before that. `streaming`: events have begun.
    """

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers: Headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.streaming = False
        self.status = 0

    async def json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """The whole answer."""
        await self.document(status, json.dumps(value).encode(), headers)

    async def document(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """The whole answer as JSON text."""
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        described = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._start(status, [*described, *extra])
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, frames: bytes) -> None:
        """Whole server-sent events; the first call begins the answer."""
        if not self.streaming:
            self.streaming = True
            await self._start(200, _EVENT_STREAM)
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})

    async def end_events(self) -> None:
        """No event follows."""
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: ChatError) -> None:
        """The error as the answer, or as the last event of an answer that has begun."""
        if self.streaming:
            await self.events(b"data: " + json.dumps(error.body()).encode() + b"\n\n")
            await self.end_events()
            return
        await self.json(error.status, error.body(), error.headers())

    async def _start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self._headers]})


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
