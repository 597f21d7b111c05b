"""One account for each request: who asked for what, who answered, and how that went, from its first byte to its last.

The relay fills it; what counts, records or waits for answers reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Account:
    """Of one request. Times but the first are seconds since it arrived; None: that has not happened.

    Where a second engine answers what the first one did not, what is told of the answer is the second one's.
    """

    surface: str
    """Which kind of request it is."""
    caller: str
    """The id of the API key; empty: an operator."""
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    arrived: float = field(default_factory=time.time)
    """Unix seconds."""
    conversation: str | None = None
    asked: str = ""
    """The model that the client named."""
    deployment: str = ""
    model: str = ""
    """What answers."""
    address: str = ""
    """The engine that answers."""
    sent: float | None = None
    first_byte: float | None = None
    first_text: float | None = None
    last_text: float | None = None
    last_byte: float | None = None
    status: int = 0
    error: str = ""
    """The code of the error that the client was told."""
    answer: str = ""
    """The id by which the client knows the answer."""
    complete: bool = False
    """The last of the answer has come."""
    failed: bool = False
    """The engine has failed, or says so in the midst of a stream."""
    streamed: bool = False
    pieces: int = 0
    """Events with text."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: list[str] = field(default_factory=list)
    """Why each choice ended."""
    _begun: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self._begun

    def ask(self, deployment: str, model: str, address: str) -> None:
        """The request goes to an engine now, and nothing of an answer has come yet."""
        self.deployment, self.model, self.address, self.sent = deployment, model, address, self.elapsed()
        self.first_byte = self.first_text = self.last_text = self.last_byte = None
        self.answer, self.complete, self.failed, self.streamed, self.pieces = "", False, False, False, 0
        self.prompt_tokens, self.completion_tokens, self.finish = None, None, []


class Accounts:
    """The accounts of requests under way.

    `begun` hears of each whose answer begins, `settled` of each whose request has ended.
    """

    def __init__(self, begun: Callable[[Account], None], settled: Callable[[Account], None]) -> None:
        self.begun = begun
        self._settled = settled
        self._open: set[Account] = set()
        self._change = asyncio.Event()

    @contextlib.contextmanager
    def open(self, account: Account) -> Iterator[Account]:
        """Keep it while its request is answered."""
        self._open.add(account)
        try:
            yield account
        finally:
            self._open.remove(account)
            self.left(account)
            self._settled(account)

    def left(self, account: Account) -> None:
        """No answer comes from its engine any more."""
        account.address = ""
        self._change.set()
        self._change = asyncio.Event()

    async def drained(self, address: str, timeout: float) -> None:
        """Wait until no answer comes from the engine at `address` any more, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while any(account.address == address for account in self._open):
                    await self._change.wait()
