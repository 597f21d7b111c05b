"""An engine as the gateway sees it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import aiohttp

from appliance.supervisor.engines import EngineKind
from serve.gateway.observation import Observation
from serve.wire.asgi import Reply
from serve.wire.errors import ChatError, no_engine

_JSON = {"content-type": "application/json"}
_LAST_EVENT = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Route:
    """Where requests go: the engine at `address` (`unix:PATH`), which serves the release `model`.

    Where `model` is an adapter, `beneath` is the release on whose weights it is, for who asks for that by its name.
    """

    address: str
    model: str
    engine_kind: EngineKind
    beneath: str | None = None


class Upstream:
    """A routed engine, and the answers on their way from it.

    An engine that sends nothing for `patience` seconds is given up.
    """

    def __init__(self, route: Route, patience: float) -> None:
        self.route = route
        self.since = int(time.time())
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=patience)
        self._answers = 0
        self._drained = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether no answer is on its way."""
        return not self._answers

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count one answer while it is on its way."""
        self._answers += 1
        self._drained.clear()
        try:
            yield
        finally:
            self._answers -= 1
            if self.idle:
                self._drained.set()

    async def drained(self) -> None:
        """Wait until no answer is on its way."""
        if not self.idle:
            await self._drained.wait()

    async def complete(
        self, request: bytes, reply: Reply, begun: Callable[[bytes], None], seen: Observation | None
    ) -> None:
        """Pass a chat completion request on, and the engine's answer back; `seen` watches it.

        `begun` gets the first events of an answer, or the whole of it, before the client does.
        Raises ChatError where the engine cannot be reached, refuses, or does not finish its answer.
        """
        try:
            async with (
                self._connection() as engine,
                engine.post("http://engine/v1/chat/completions", data=request, headers=_JSON) as response,
            ):
                if response.status != 200:
                    raise _refusal(response.status, await response.read())
                if response.content_type == "text/event-stream":
                    await _relay(response.content, reply, begun, seen)
                else:
                    body = _as_clients_read(await response.read())
                    begun(body)
                    if seen:
                        seen.document(body)
                    await reply.document(200, body)
        except aiohttp.ClientConnectorError:
            raise no_engine("the model is being restarted; try again in a few seconds") from None
        except TimeoutError:
            raise ChatError(504, "the model has stopped answering; try again", code="engine_timeout") from None
        except aiohttp.ClientError:
            raise _cut_short() from None

    def _connection(self) -> aiohttp.ClientSession:
        # One for each request: a local socket costs next to nothing, and a kept one may just have been closed.
        return aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self.route.address.removeprefix("unix:")),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
        )


async def _relay(
    stream: aiohttp.StreamReader, reply: Reply, begun: Callable[[bytes], None], seen: Observation | None
) -> None:
    """Pass whole events on, so that an error can follow wherever the engine breaks off."""
    rest = b""
    complete = False
    async for chunk in stream.iter_any():
        rest += chunk
        end = rest.rfind(b"\n\n") + 2
        if end > 1:
            frames, rest = _as_clients_read(rest[:end]), rest[end:]
            complete = frames.endswith(_LAST_EVENT)
            if not reply.streaming:
                begun(frames)
            if seen:
                seen.events(frames, complete)
            await reply.events(frames)
    if not complete:
        raise _cut_short()
    await reply.end_events()


def _as_clients_read(answer: bytes) -> bytes:
    """An answer with a thought under the key that most clients read, and not the one that vLLM has for it."""
    # A text in JSON has a backslash before each quote, so that this is a key.
    return answer.replace(b'"reasoning":', b'"reasoning_content":')


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
