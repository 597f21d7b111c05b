"""Who may be answered now, who waits, and who is told to come again: the places at the engine of one deployment."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from serve.wire.errors import ChatError, no_engine

WAITING_AT_MOST = 256
"""Requests that may wait for a place."""


@dataclass(frozen=True)
class Route:
    """Where requests go: the engine at `address` (`unix:PATH`), which serves the release `model`.

    Where `model` is an adapter, `beneath` is the release on whose weights it is, for those who ask for it by name.
    """

    address: str
    model: str
    beneath: str | None = None


@dataclass(eq=False)
class Engine:
    """The engine that a deployment has now, and how many answers it gives at this moment."""

    route: Route
    since: float
    answers: int = 0


@dataclass(frozen=True)
class Absence:
    """Why nobody answers, and when somebody will again, in seconds, as far as that is known."""

    reason: str
    seconds: float | None = None

    def refusal(self) -> ChatError:
        """What a client is told, who need not ask more often than each hour."""
        return no_engine(self.reason, max(1, min(round(self.seconds), 3600)) if self.seconds is not None else 5)


NOTHING_LIVE = Absence("no model is live; train and promote a release, or wait until its engine has started")


async def nothing_live() -> Absence:
    """Nobody knows why nobody answers."""
    return NOTHING_LIVE


@dataclass(eq=False)
class Deployment:
    """One engine after the other, and the line of requests before it: first come, first served.

    An engine gives `at_once` answers at a time. A request waits for a place, or for an engine on its way, at most
    `wait_seconds`. `absence` says why there is no engine.
    """

    name: str
    at_once: int
    wait_seconds: float
    absence: Callable[[], Awaitable[Absence]] = nothing_live
    engine: Engine | None = None
    coming: bool = False
    """An engine is on its way: requests wait for it."""
    _line: deque[tuple[asyncio.Future[Engine | None], int]] = field(default_factory=deque)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._line)

    def route(self, route: Route | None) -> None:
        """Let another engine answer, or none. Answers that have begun go on."""
        present = self.engine
        # The same process under another name has the same places.
        answers = present.answers if present and route and present.route.address == route.address else 0
        self.engine = None if route is None else Engine(route, time.time(), answers)
        self._let_in()

    def hold(self, on: bool) -> None:
        """While there is no engine, let requests wait for one that is on its way, or refuse them at once."""
        self.coming = on
        self._let_in()

    @contextlib.asynccontextmanager
    async def place(self, answers: int) -> AsyncIterator[Engine]:
        """An engine with room for so many more answers, as soon as there is one. Raises ChatError."""
        size = min(answers, self.at_once)
        while (engine := await self._enter(size)) is not self.engine:
            # Another one has taken its place since, and it may be at an end already.
            self._leave(engine, size)
        try:
            yield engine
        finally:
            self._leave(engine, size)

    async def _enter(self, size: int) -> Engine:
        if not self._line and self.engine and self._fits(self.engine, size):
            self.engine.answers += size
            return self.engine
        if self.engine is None and not self.coming:
            raise (await self.absence()).refusal()
        if len(self._line) >= WAITING_AT_MOST:
            raise no_engine("too many requests wait for the model; try again in a few seconds")
        turn: asyncio.Future[Engine | None] = asyncio.get_running_loop().create_future()
        self._line.append((turn, size))
        try:
            async with asyncio.timeout(self.wait_seconds):
                engine = await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and (given := turn.result()):
                self._leave(given, size)
            turn.cancel()
            self._let_in()
            if not isinstance(error, TimeoutError):
                raise
            busy = "is still starting" if self.engine is None else "is busy with other requests"
            raise no_engine(f"the model {busy}; try again in a few seconds") from None
        if engine is None:
            raise (await self.absence()).refusal()
        return engine

    def _leave(self, engine: Engine, size: int) -> None:
        engine.answers -= size
        self._let_in()

    def _let_in(self) -> None:
        """Give places to those who wait, in their order; where no engine comes, tell them so."""
        while self._line:
            turn, size = self._line[0]
            if not turn.done():
                if self.engine and self._fits(self.engine, size):
                    self.engine.answers += size
                    turn.set_result(self.engine)
                elif self.engine is None and not self.coming:
                    turn.set_result(None)
                else:
                    return
            self._line.popleft()

    def _fits(self, engine: Engine, size: int) -> bool:
        return engine.answers + size <= self.at_once
