"""An engine that loads nothing: its process makes a file at its address, which says that it is ready."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from appliance.api import Precision
from appliance.canary import Comparison
from appliance.data.tokenizer import TemplateSettings
from appliance.errors import InvalidInput
from appliance.supervisor.engines import EngineCommand, Probe, ProbeAnswer, Room


@dataclass
class FakeEngine:
    """`token_ids` is how it renders every prompt; `broken` releases never start, `unloadable` ones are not
    taken in place of others, `strange` ones answer otherwise when they are, and a load waits for `loading`, as to fall
    asleep does for `falling_asleep`.
    `refusal`: why it takes no adapter. `forgetful`: prompts that a release answers otherwise than all others. Every
    answer says which day it is."""

    name: str = "fake"
    honours: frozenset[str] = frozenset({"messages", "model", "stream"})
    ready_seconds: float = 60.0
    token_ids: list[int] = field(default_factory=lambda: [1, 2])
    broken: set[str] = field(default_factory=set)
    reloads: bool = False
    loaded: list[str] = field(default_factory=list)
    unloadable: set[str] = field(default_factory=set)
    strange: set[str] = field(default_factory=set)
    loading: asyncio.Event | None = None
    measures: bool = False
    sleeps: bool = False
    asleep: set[str] = field(default_factory=set)
    """Addresses of the processes that sleep."""
    falling_asleep: asyncio.Event | None = None
    insomnia: Exception | None = None
    """What becomes of a process that is to sleep, and does not."""
    muddled: bool = False
    """Processes that have slept render prompts otherwise."""
    slept: set[str] = field(default_factory=set)
    size: int = 0
    precision: Precision = "16-bit"
    adapter_rank: int = 0
    adapters: list[str] = field(default_factory=list)
    refusal: str = ""
    logps: list[float] | None = None
    """What it says of every conversation, if it can."""
    clocks: dict[str, date | None] = field(default_factory=dict)
    """What each process takes for today, by its address."""
    thinking: dict[str, bool | None] = field(default_factory=dict)
    """Whether each process was started with a template that has the model think, by its address."""
    forgetful: dict[str, set[str]] = field(default_factory=dict)
    probed: list[str] = field(default_factory=list)
    started: list[tuple[str, Precision | None]] = field(default_factory=list)
    unreachable: int = 0

    def memory(self, release: Path) -> int:
        return self.size

    async def reload(self, address: str, release: Path, name: str, clock: date | None = None) -> None:
        self.loaded.append(name)
        self.clocks[address] = clock
        if self.loading:
            await self.loading.wait()
        if name in self.unloadable:
            raise ConnectionError("no such weights")
        self.asleep.discard(address)

    async def sleep(self, address: str) -> None:
        if self.falling_asleep:
            await self.falling_asleep.wait()
        if self.insomnia:
            raise self.insomnia
        self.asleep.add(address)
        self.slept.add(address)

    async def load_adapter(self, address: str, adapter: Path, name: str) -> None:
        if self.refusal:
            raise InvalidInput("engine_refused", self.refusal, "")
        self.adapters.append(name)

    def command(
        self,
        release: Path,
        name: str,
        socket: Path,
        template: TemplateSettings | None = None,
        precision: Precision | None = None,
    ) -> EngineCommand:
        self.started.append((name, precision))
        self.clocks[f"unix:{socket}"] = template and template.today
        self.thinking[f"unix:{socket}"] = template and template.thinking
        socket.unlink(missing_ok=True)
        code = f"open({str(socket)!r}, 'w').close(); import time; time.sleep(60)"
        argv = [sys.executable, "-c", "raise SystemExit(1)" if name in self.broken else code]
        return EngineCommand(argv, {}, f"unix:{socket}")

    async def ready(self, address: str) -> bool:
        return Path(address.removeprefix("unix:")).exists()

    async def logprobs(self, address: str, name: str, token_ids: list[int]) -> list[float] | None:
        return self.logps

    def room(self, model: Path, *, beside: bool = False) -> Room:
        return Room(self.size, None, self.precision)

    async def probe(self, address: str, name: str, probe: Probe) -> ProbeAnswer:
        self.probed.append(name)
        if self.unreachable:
            self.unreachable -= 1
            raise ConnectionError("it is gone")
        if probe.messages[0]["content"] == "too long":
            raise InvalidInput("engine_refused", "the engine refuses a prompt of 9000 tokens", "")
        if probe.messages[0]["content"] in self.forgetful.get(name, ()):
            return ProbeAnswer(self.token_ids, "what?", "stop", 1)
        said = "hm" if name in self.loaded and name in self.strange else f"hello on {self.clocks[address]}"
        token_ids = [0] if self.muddled and address in self.slept else self.token_ids
        return ProbeAnswer(token_ids, said, "stop", 1)


@dataclass
class FakeFrontage:
    """Remembers who was let answer."""

    routes: list[str | None] = field(default_factory=list)
    holds: list[bool] = field(default_factory=list)
    drains: list[float] = field(default_factory=list)
    canaries: list[tuple[str, float] | None] = field(default_factory=list)
    comparison: Comparison = field(default_factory=lambda: Comparison("", ""))

    def route(self, model: str | None, address: str, beneath: str | None) -> None:
        self.routes.append(model)

    def hold(self, on: bool) -> None:
        self.holds.append(on)

    def route_canary(self, release: str, address: str, share: float, comparison: Comparison) -> None:
        self.canaries.append((release, share))
        self.comparison = comparison

    def end_canary(self) -> None:
        self.canaries.append(None)

    async def drained(self, address: str, timeout: float) -> None:
        self.drains.append(timeout)
