"""From the gateway to an engine and back: a request goes on as it is, and its answer piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

import aiohttp

from serve.gateway.account import Account
from serve.wire.asgi import Reply
from serve.wire.errors import ChatError, no_engine

_JSON = {"content-type": "application/json"}


class Passing(Protocol):
    """An answer on its way, of which the client gets what these return; its account hears of it."""

    account: Account

    def events(self, frames: bytes) -> bytes:
        """Whole server-sent events have come."""
        ...

    def document(self, body: bytes) -> bytes:
        """The whole answer has come."""
        ...


async def relay(
    path: str,
    request: bytes,
    answer: Passing,
    reply: Reply,
    patience: float,
    begun: Callable[[Account], None],
) -> None:
    """Ask the engine of the account, and pass its answer on. An engine that sends nothing for `patience` is given up.

    `begun` hears of the first of an answer before the client does. Raises ChatError where the engine cannot be
    reached, refuses, or does not finish its answer.
    """
    address = answer.account.address.removeprefix("unix:")
    try:
        async with (
            _connection(address, patience) as engine,
            engine.post(f"http://engine{path}", data=request, headers=_JSON) as response,
        ):
            if response.status != 200:
                raise _refusal(response.status, await response.read())
            if response.content_type == "text/event-stream":
                await _stream(response.content, answer, reply, begun)
            else:
                body = answer.document(await response.read())
                begun(answer.account)
                await reply.document(200, body)
    except aiohttp.ClientConnectorError:
        raise no_engine("the model is being restarted; try again in a few seconds") from None
    except TimeoutError:
        raise ChatError(504, "the model has stopped answering; try again", code="engine_timeout") from None
    except aiohttp.ClientError:
        raise _cut_short() from None


async def _stream(
    stream: aiohttp.StreamReader, answer: Passing, reply: Reply, begun: Callable[[Account], None]
) -> None:
    """Pass whole events on, so that an error can follow wherever the engine breaks off."""
    rest = b""
    async for chunk in stream.iter_any():
        rest += chunk
        end = rest.rfind(b"\n\n") + 2
        if end > 1:
            frames, rest = answer.events(rest[:end]), rest[end:]
            if not reply.streaming:
                begun(answer.account)
            if frames:
                await reply.events(frames)
    if not answer.account.complete:
        raise _cut_short()
    await reply.end_events()


def _connection(path: str, patience: float) -> aiohttp.ClientSession:
    # One for each request: a local socket costs next to nothing, and a kept one may just have been closed.
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(path),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=patience),
    )


def _cut_short() -> ChatError:
    return ChatError(502, "the model broke off before its answer was complete; try again", code="engine_died")


def _refusal(status: int, body: bytes) -> ChatError:
    """An engine's error in the one shape that clients get."""
    try:
        error = json.loads(body)["error"]
        message, param, code = str(error["message"]), error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param, code = f"the engine answered {status}", None, None
    if status == 503:
        return no_engine(message)
    if status >= 500:
        return ChatError(502, f"the model failed: {message}", code="engine_failed")
    if "maximum context length" in message or "max_model_len" in message:
        code = "context_length_exceeded"
    return ChatError(
        status,
        message,
        code=code if isinstance(code, str) else None,
        param=param if isinstance(param, str) else None,
    )
