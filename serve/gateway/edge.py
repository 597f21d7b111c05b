"""The chat endpoint's face: an allow-list of routes, keys, and one account for each request that is to be answered."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Set
from typing import Any

from starlette.types import Receive, Scope, Send

from appliance.canary import Comparison
from serve.gateway.account import Account, Accounts
from serve.gateway.admission import Absence, Route, nothing_live
from serve.gateway.dispatch import Ability, Dispatch
from serve.gateway.ledger import Ledger
from serve.gateway.surfaces import chat, feedback
from serve.wire.asgi import ClientGone, Reply, read_json, until_gone
from serve.wire.errors import ChatError, shown

log = logging.getLogger(__name__)

BODY_LIMIT = 4 << 20
"""Largest request, in bytes."""

FEEDBACK_LIMIT = 256 << 10
"""The same for feedback, whose correction may be a long answer."""

CLIENT_LEFT = 499
"""Status on record of a request whose client left before it was told anything."""

CONVERSATION_HEADER = b"x-conversation-id"

_MODELS = "/v1/models"
_METHODS = {
    "/healthz": ("GET", "HEAD"),
    "/readyz": ("GET", "HEAD"),
    _MODELS: ("GET",),
    chat.PATH: ("POST",),
    feedback.PATH: ("POST",),
}
_KEYLESS = frozenset({"/healthz", "/readyz"})
_FOR_OPERATORS = frozenset({chat.PATH, feedback.PATH})


class Gateway:
    """The ASGI app of the public port.

    `authenticate` gives the id of a good API key. `ledger` hears of every account. `wanted`, `patience` and
    `hold_seconds` are as Dispatch has them; `absence` says why nobody answers.
    """

    def __init__(
        self,
        authenticate: Callable[[str], str | None],
        ledger: Ledger,
        ability: Ability,
        wanted: Callable[[], Set[str]] = frozenset,
        patience: float = 600,
        hold_seconds: float = 120,
        absence: Callable[[], Awaitable[Absence]] = nothing_live,
    ) -> None:
        self._authenticate = authenticate
        self._ledger = ledger
        self._absence = absence
        self._accounts = Accounts(ledger.begun, ledger.settled)
        self._dispatch = Dispatch(ability, self._accounts, wanted, absence, patience, hold_seconds)

    def route(self, route: Route | None) -> None:
        """Send new requests there, or nowhere. Answers that have begun go on."""
        self._dispatch.live.route(route)

    def hold(self, on: bool) -> None:
        """While nobody answers, let new requests wait for an engine that is on its way, or refuse them at once."""
        self._dispatch.live.hold(on)

    def route_canary(self, route: Route, share: float, comparison: Comparison) -> None:
        """Send a share of the conversations there, and count in `comparison` how both releases answer."""
        self._dispatch.route_canary(route, share, comparison)

    def end_canary(self) -> None:
        """Send all conversations to the live release, and count no longer. Answers that have begun go on."""
        self._dispatch.end_canary()

    async def drained(self, address: str, timeout: float) -> None:
        """Wait until the engine at `address` has given its last answer, at most `timeout` seconds."""
        await self._accounts.drained(address, timeout)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send, operator=False)

    async def operator(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI app for a listener that only operators reach: chat and feedback, and no key is asked for."""
        await self._serve(scope, receive, send, operator=True)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, operator: bool) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"the gateway speaks http, not {scope['type']}")
        account = Account(chat.SURFACE, "")
        reply = Reply(send, {"x-request-id": account.id})
        try:
            path = scope["path"]
            known = _MODELS if path.startswith(f"{_MODELS}/") and path != f"{_MODELS}/" else path
            if known not in _METHODS or (operator and known not in _FOR_OPERATORS):
                raise ChatError(404, f"there is nothing at {shown(path)}", code="unknown_url")
            if scope["method"] not in _METHODS[known]:
                allowed = ", ".join(_METHODS[known])
                raise ChatError(405, f"{shown(path)} takes {allowed}", code="method_not_allowed", allow=allowed)
            account.caller = "" if operator or path in _KEYLESS else self._require_key(scope)
            await self._answer(path, scope, receive, reply, account)
        except ChatError as error:
            await reply.error(error)
        except ClientGone:
            pass
        except Exception:
            log.exception("%s failed", account.id)
            await reply.error(ChatError(500, "the gateway failed; see its log", code="gateway_failed"))

    async def _answer(self, path: str, scope: Scope, receive: Receive, reply: Reply, account: Account) -> None:
        match path:
            case "/healthz":
                await reply.json(200, {"status": "ok"})
            case "/readyz":
                engine = self._dispatch.live.engine
                if engine is None:
                    raise (await self._absence()).refusal()
                await reply.json(200, {"status": "ready", "model": engine.route.model})
            case chat.PATH:
                with self._accounts.open(account):
                    await self._chat(scope, receive, reply, account)
            case feedback.PATH:
                remark = feedback.read_feedback(await read_json(receive, FEEDBACK_LIMIT))
                await self._ledger.give(remark, account.caller)
                await reply.json(200, {"id": remark.id, "rating": remark.rating})
            case _:
                await reply.json(200, self._models(path.removeprefix(_MODELS).removeprefix("/")))

    async def _chat(self, scope: Scope, receive: Receive, reply: Reply, account: Account) -> None:
        try:
            request = await read_json(receive, BODY_LIMIT)
            conversation = chat.conversation_of(request, _header(scope, CONVERSATION_HEADER), account.caller)
            account.conversation = conversation and shown(conversation)
            await until_gone(receive, self._dispatch.complete(request, conversation, account, reply))
        except ChatError as error:
            account.error, account.status = error.code or str(error.status), reply.status or error.status
            raise
        except ClientGone:
            raise
        except Exception as error:
            account.error, account.status = type(error).__name__, reply.status or 500
            raise
        finally:
            account.status = account.status or reply.status or CLIENT_LEFT

    def _models(self, name: str) -> dict[str, Any]:
        """All models that answer now, or the one of that name. Raises ChatError."""
        shapes = {
            id: {"id": id, "object": "model", "created": int(since), "owned_by": "appliance"}
            for id, since in self._dispatch.models().items()
        }
        if not name:
            return {"object": "list", "data": list(shapes.values())}
        if name not in shapes:
            raise ChatError(
                404, f"the model '{shown(name)}' does not answer here", code="model_not_found", param="model"
            )
        return shapes[name]

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
