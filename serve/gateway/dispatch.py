"""Which deployment answers a chat completion: the live one, or the canary."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Set
from typing import Any, Protocol

from appliance.canary import Comparison
from serve.gateway.account import Account, Accounts
from serve.gateway.admission import Absence, Deployment, Route
from serve.gateway.canary import Canary
from serve.gateway.relay import relay
from serve.gateway.surfaces import chat
from serve.wire.asgi import Reply
from serve.wire.errors import ChatError, no_engine, shown
from serve.wire.fields import MODEL_ALIAS, admit

log = logging.getLogger(__name__)


class Ability(Protocol):
    """What the gateway has to know of the box's kind of engine."""

    @property
    def honours(self) -> Set[str]:
        """Names of the fields that it really obeys."""
        ...

    @property
    def at_once(self) -> int:
        """Answers that it works on at a time; more would wait within it."""
        ...

    @property
    def longest_answer(self) -> int:
        """Tokens that an answer has at most."""
        ...

    @property
    def token_seconds(self) -> float:
        """How long a token of a slow answer may take."""
        ...


class Dispatch:
    """Sends chat completions to the engines that it is told of.

    `wanted` names the releases that are to answer, with or without an engine now. An engine that sends nothing for
    `patience` seconds is given up; one that is to send its whole answer at once has the time that so many tokens take
    besides. A request waits for its turn at most `hold_seconds`.
    """

    def __init__(
        self,
        ability: Ability,
        accounts: Accounts,
        wanted: Callable[[], Set[str]],
        absence: Callable[[], Awaitable[Absence]],
        patience: float,
        hold_seconds: float,
    ) -> None:
        self._ability = ability
        self._accounts = accounts
        self._wanted = wanted
        self._patience = patience
        self.live = Deployment(MODEL_ALIAS, ability.at_once, hold_seconds, absence)
        self._candidate = Deployment("canary", ability.at_once, hold_seconds)
        self._canary: Canary | None = None

    def route_canary(self, route: Route, share: float, comparison: Comparison) -> None:
        """Send a share of the conversations there, and count in `comparison` how both releases answer."""
        self._candidate.route(route)
        self._canary = Canary(share, comparison)

    def end_canary(self) -> None:
        """Send all conversations to the live release, and count no longer. Answers that have begun go on."""
        self._canary = None
        self._candidate.route(None)

    def models(self) -> dict[str, float]:
        """The names that answer now, and since when."""
        found = {}
        if live := self.live.engine:
            found = {MODEL_ALIAS: live.since, live.route.model: live.since}
        if candidate := self._candidate.engine:
            found[candidate.route.model] = candidate.since
        return found

    async def complete(self, request: dict[str, Any], conversation: str | None, account: Account, reply: Reply) -> None:
        """Let the canary answer what falls to it; what it fails before the first byte, the live release answers.

        What the request itself is refused for is said before it waits for anything.
        """
        admitted = admit(request, self._ability.honours)
        asked = admitted.get("model", MODEL_ALIAS)
        account.asked = shown(asked)
        canary = self._canary
        named = canary is not None and asked == canary.comparison.candidate
        if not named:
            self._require_known(asked)
        if canary and (named or (asked == MODEL_ALIAS and canary.takes(conversation))):
            try:
                return await self._answer(admitted, self._candidate, account, reply)
            except ChatError as error:
                if error.status < 500 or reply.streaming or named:
                    raise
                log.warning("%s: the canary failed, and the live release answers: %s", account.id, error)
        await self._answer(admitted, self.live, account, reply)

    async def _answer(self, admitted: dict[str, Any], deployment: Deployment, account: Account, reply: Reply) -> None:
        asked, ability = admitted.get("model", MODEL_ALIAS), self._ability
        async with deployment.place(chat.choices(admitted)) as engine:
            model = engine.route.model if asked == MODEL_ALIAS else asked
            if model not in (engine.route.model, engine.route.beneath):
                self._require_known(asked)
            passed = chat.told_usage(admitted, ability.honours) | {"model": model}
            patience = self._patience
            if not admitted.get("stream"):
                patience += chat.longest_answer(admitted, ability.longest_answer) * ability.token_seconds
            account.ask(deployment.name, model, engine.route.address)
            try:
                await relay(
                    chat.PATH,
                    json.dumps(passed).encode(),
                    chat.Answer(account, admitted),
                    reply,
                    patience,
                    self._accounts.begun,
                )
            except ChatError as error:
                account.complete, account.failed = False, error.status >= 500
                raise
            finally:
                # A client that has its whole answer may be gone before this is reached: then it is cancelled, and
                # counts.
                if self._canary:
                    self._canary.count(account)
                self._accounts.left(account)

    def _require_known(self, asked: str) -> None:
        """Raise ChatError unless somebody answers by that name, or may do so soon."""
        live = self.live.engine
        here = (MODEL_ALIAS, live.route.model, live.route.beneath) if live else (MODEL_ALIAS,)
        if asked in here:
            return
        if asked not in self._wanted():
            instead = f"'{MODEL_ALIAS}' or '{live.route.model}'" if live else f"'{MODEL_ALIAS}'"
            raise ChatError(
                404,
                f"the model '{shown(asked)}' does not answer here; use {instead}",
                code="model_not_found",
                param="model",
            )
        if live:
            raise no_engine(f"the engine of '{asked}' is away; try again in a few seconds")
