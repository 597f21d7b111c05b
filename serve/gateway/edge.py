"""The chat endpoint: an allow-list of routes, keys, and requests passed on to the live engine or the canary's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import Callable, Set
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send

from appliance.canary import Comparison
from serve.gateway.canary import CONVERSATION_HEADER, Canary, conversation_of, counted
from serve.gateway.ledger import Ledger, read_feedback
from serve.gateway.relay import Route, Upstream
from serve.wire.asgi import ClientGone, Reply, read_body, read_json, until_gone
from serve.wire.errors import ChatError, no_engine
from serve.wire.fields import MODEL_ALIAS, admit

__all__ = ["Gateway", "Route"]

log = logging.getLogger(__name__)

BODY_LIMIT = 4 << 20
"""Largest request, in bytes."""

FEEDBACK_LIMIT = 256 << 10
"""The same for feedback, whose correction may be a long answer."""

HELD_AT_MOST = 256
"""Requests that may wait for an engine on its way."""

_CHAT = "/v1/chat/completions"
_FEEDBACK = "/v1/feedback"
_METHODS = {"/healthz": "GET", "/readyz": "GET", "/v1/models": "GET", _CHAT: "POST", _FEEDBACK: "POST"}
_KEYLESS = frozenset({"/healthz", "/readyz"})
_FOR_OPERATORS = frozenset({_CHAT, _FEEDBACK})


class Gateway:
    """The ASGI app of the public port.

    `authenticate` gives the id of a good API key. `ledger` is told of every answer. `wanted` names the releases that
    are to answer, with or without an engine now; where there are none, `setback` may know why. An engine that sends
    nothing for `patience` seconds is given up. A request waits for an engine on its way at most `hold_seconds`.
    """

    def __init__(
        self,
        authenticate: Callable[[str], str | None],
        ledger: Ledger,
        wanted: Callable[[], Set[str]] = frozenset,
        patience: float = 600,
        hold_seconds: float = 120,
        setback: Callable[[], str] = str,
    ) -> None:
        self._authenticate = authenticate
        self._ledger = ledger
        self._wanted = wanted
        self._setback = setback
        self._patience = patience
        self._hold_seconds = hold_seconds
        self._holding = False
        self._held = 0
        self._turn = asyncio.Event()
        self._routed: Upstream | None = None
        self._canary: Canary | None = None
        self._retired: list[Upstream] = []

    def route(self, route: Route | None) -> None:
        """Send new requests there, or nowhere. Answers that have begun go on."""
        self._retire(self._routed)
        self._routed = None if route is None else Upstream(route, self._patience)
        self._look_again()

    def route_canary(self, route: Route, share: float, comparison: Comparison) -> None:
        """Send a share of the conversations there, and count in `comparison` how both releases answer."""
        self.end_canary()
        self._canary = Canary(Upstream(route, self._patience), share, comparison)

    def end_canary(self) -> None:
        """Send all conversations to the live release, and count no longer. Answers that have begun go on."""
        self._retire(self._canary.upstream if self._canary else None)
        self._canary = None

    def hold(self, on: bool) -> None:
        """While nobody answers, let new requests wait for an engine that is on its way, or refuse them at once."""
        self._holding = on
        self._look_again()

    async def drained(self, address: str, timeout: float) -> None:
        """Wait until the engine that was routed at `address` has given its last answer, at most `timeout` seconds."""
        leaving = [upstream.drained() for upstream in self._retired if upstream.route.address == address]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*leaving), timeout)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send, operator=False)

    async def operator(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI app for a listener that only operators reach: chat and feedback, and no key is asked for."""
        await self._serve(scope, receive, send, operator=True)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, operator: bool) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"the gateway speaks http, not {scope['type']}")
        reply = Reply(send, {"x-request-id": f"req_{uuid.uuid4().hex}"})
        try:
            path = scope["path"]
            if path not in _METHODS or (operator and path not in _FOR_OPERATORS):
                raise ChatError(404, f"there is nothing at {path}", code="unknown_url")
            if scope["method"] != _METHODS[path]:
                raise ChatError(405, f"{path} takes {_METHODS[path]}", code="method_not_allowed")
            caller = "" if operator or path in _KEYLESS else self._require_key(scope)
            await self._answer(path, scope, receive, reply, caller)
        except ChatError as error:
            await reply.error(error)
        except ClientGone:
            pass
        except Exception:
            log.exception("a request failed")
            await reply.error(ChatError(500, "the gateway failed; see its log", code="gateway_failed"))

    async def _answer(self, path: str, scope: Scope, receive: Receive, reply: Reply, caller: str) -> None:
        match path:
            case "/healthz":
                await reply.json(200, {"status": "ok"})
            case "/readyz":
                await reply.json(200, {"status": "ready", "model": self._ready().route.model})
            case "/v1/models":
                await reply.json(200, {"object": "list", "data": self._models()})
            case "/v1/feedback":
                remark = read_feedback(read_json(await read_body(receive, FEEDBACK_LIMIT)))
                await self._ledger.give(remark, caller)
                await reply.json(200, {"id": remark.id, "rating": remark.rating})
            case _:
                request = read_json(await read_body(receive, BODY_LIMIT))
                conversation = conversation_of(request, _header(scope, CONVERSATION_HEADER), caller)
                await until_gone(receive, self._complete(request, conversation, caller, reply))

    async def _complete(self, request: dict[str, Any], conversation: str | None, caller: str, reply: Reply) -> None:
        """Let the canary answer what falls to it; what it fails before the first byte, the live release answers."""
        if (canary := self._canary) and canary.takes(request, conversation):
            candidate = canary.comparison.candidate
            try:
                return await self._pass_on(request, canary.upstream, caller, reply)
            except ChatError as error:
                if error.status < 500 or reply.streaming or request.get("model") == candidate:
                    raise
                log.warning("the canary %s failed, and the live release answers: %s", candidate, error)
        await self._pass_on(request, await self._ready_soon(), caller, reply)

    async def _pass_on(self, request: dict[str, Any], upstream: Upstream, caller: str, reply: Reply) -> None:
        route = upstream.route
        admitted = admit(request, route.engine_kind.honours)
        model = admitted.get("model", MODEL_ALIAS)
        model = route.model if model == MODEL_ALIAS else model
        if model not in (route.model, route.beneath):
            if model in self._wanted():
                raise no_engine(f"the engine of '{model}' is away; try again in a few seconds")
            raise ChatError(
                404,
                f"the model '{model}' does not answer here; use '{MODEL_ALIAS}' or '{route.model}'",
                code="model_not_found",
                param="model",
            )
        passed = json.dumps(admitted | {"model": model}).encode()
        tally = self._canary.comparison.tally(model) if self._canary else None
        begun = partial(self._ledger.note, release=model, key=caller)
        with upstream.answering(), counted(tally) as seen:
            await upstream.complete(passed, reply, begun, seen)

    async def _ready_soon(self) -> Upstream:
        """The routed engine, waited for where one is on its way. Raises ChatError where none comes in time."""
        if self._routed is None and self._holding:
            if self._held >= HELD_AT_MOST:
                raise no_engine("too many requests wait for the model, which is being changed; try again")
            self._held += 1
            try:
                async with asyncio.timeout(self._hold_seconds):
                    while self._routed is None and self._holding:
                        await self._turn.wait()
            except TimeoutError:
                raise no_engine("the model is still starting; try again in a few seconds") from None
            finally:
                self._held -= 1
        return self._ready()

    def _retire(self, upstream: Upstream | None) -> None:
        """Remember an engine that is asked no more until it has given its last answer."""
        self._retired = [each for each in (*self._retired, upstream) if each and not each.idle]

    def _look_again(self) -> None:
        """Wake whoever waits for an engine."""
        self._turn.set()
        self._turn = asyncio.Event()

    def _ready(self) -> Upstream:
        if self._routed is None:
            why = "" if self._wanted() else self._setback()
            raise no_engine(
                f"no model is live: {why}"
                if why
                else "no model is live; train and promote a release, or wait until its engine has started"
            )
        return self._routed

    def _models(self) -> list[dict[str, object]]:
        named = [(MODEL_ALIAS, self._routed)] if self._routed else []
        named += [(each.route.model, each) for each in (self._routed, self._canary and self._canary.upstream) if each]
        return [
            {"id": name, "object": "model", "created": upstream.since, "owned_by": "appliance"}
            for name, upstream in named
        ]

    def _require_key(self, scope: Scope) -> str:
        """The id of the request's API key. Raises ChatError unless it is a good one."""
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ChatError(
                401, "an API key is needed: send the header 'Authorization: Bearer KEY'", code="missing_api_key"
            )
        caller = self._authenticate(key.strip())
        if not caller:
            raise ChatError(401, "the API key is wrong or was revoked", code="invalid_api_key")
        return caller


def _header(scope: Scope, wanted: bytes) -> str:
    """The first header of that name (in lower case), empty where there is none."""
    return next((value for name, value in scope["headers"] if name == wanted), b"").decode("latin-1")
