"""An engine that does what a test says, down to the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.gateway.admission import Route

KEY, OTHER_KEY = "sk-good", "sk-other"
"""The API keys that the gateway under test takes."""

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]

OVERFLOW_OF_VLLM = {
    "error": {
        "message": "This model's maximum context length is 1024 tokens. However, your prompt contains at least 1025 "
        "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input "
        "prompt. (parameter=input_tokens, value=1025)",
        "type": "BadRequestError",
        "param": "input_tokens",
        "code": 400,
    }
}


def chunk(text: str, finish_reason: str | None = None) -> bytes:
    """One event of a streamed answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "r1"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "r1",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "logprobs": None, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}
STREAM = chunk("Hel") + chunk("lo") + chunk("", "stop") + b"data: [DONE]\n\n"
_EVENT_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


class ScriptedEngine:
    """Listens on a unix socket. `script` answers each request; `requests` holds what came, `left` is set when a
    client closes its connection before the script has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.script: Script = answer(200, ANSWER)
        self.requests: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        self.left = asyncio.Event()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"unix:{self.path}"

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
            )
            self.requests.append(json.loads(await reader.readexactly(length)))
            self.arrived.set()
            scripted = asyncio.ensure_future(self.script(writer))
            closed = asyncio.ensure_future(reader.read())
            await asyncio.wait((scripted, closed), return_when=asyncio.FIRST_COMPLETED)
            if not scripted.done():
                self.left.set()
            for task in (scripted, closed):
                task.cancel()
            await asyncio.wait((scripted, closed))
        writer.close()


def answer(status: int, body: Any) -> Script:
    """A whole answer."""

    async def script(writer: asyncio.StreamWriter) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        writer.write(head.encode() + text)
        await writer.drain()

    return script


def events(*parts: bytes, pause: float = 0, end: bool = True) -> Script:
    """A stream in the given pieces; without `end` the connection breaks after the last."""

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(_EVENT_STREAM_HEAD)
        for part in parts:
            writer.write(b"%x\r\n" % len(part) + part + b"\r\n")
            await writer.drain()
            await asyncio.sleep(pause)
        if end:
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    return script


def stall(*parts: bytes) -> Script:
    """A stream that goes silent after the given pieces; before the headers where there are none."""

    async def script(writer: asyncio.StreamWriter) -> None:
        if parts:
            await events(*parts, end=False)(writer)
        await asyncio.Event().wait()

    return script


def broken_answer() -> Script:
    """Half of a whole answer, then the end of the connection."""

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{"id": "chat')
        await writer.drain()

    return script


@dataclass(frozen=True)
class Kind:
    """What the gateway has to know of a kind of engine."""

    at_once: int = 64
    longest_answer: int = 100
    token_seconds: float = 0.0
    honours: frozenset[str] = frozenset(
        {"model", "messages", "stream", "stream_options", "temperature", "max_tokens", "stop", "n"}
    )


def route(engine: ScriptedEngine, model: str = "r1") -> Route:
    return Route(engine.address, model)
