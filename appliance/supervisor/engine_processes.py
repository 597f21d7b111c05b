"""The engine processes: starting, listening to, exchanging their weights, stopping. Each is a row of the database."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from appliance import api, hardware
from appliance.api import EngineState
from appliance.errors import ApplianceError, reason
from appliance.home import Home
from appliance.store.processes import Processes, ProcessRow
from appliance.store.releases import Releases
from appliance.supervisor import processes
from appliance.supervisor.decide import rests
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.exchange import load_weights, replay
from appliance.supervisor.served_models import ServedModels
from appliance.supervisor.sleep import Sleep
from appliance.supervisor.snapshot import AdapterView, EngineView, Failure, ReplayView
from appliance.supervisor.trial import CanaryRoutes
from appliance.supervisor.watch import explain_death, last_lines
from appliance.train.events import EventLog

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
HUNG_SECONDS = 60.0
"""An engine that was ready and has not answered for so long is restarted."""
RETRY_SECONDS = 1.0
"""Between two attempts at what did not work with an engine."""


class Frontage(CanaryRoutes, Protocol):
    """The public face, which the supervisor tells who answers."""

    def route(self, model: str | None, address: str, beneath: str | None) -> None:
        """Let the engine at `address` answer as `model` from now on, or nobody.

        Where `model` is an adapter, `beneath` is the release on whose weights it is.
        """
        ...

    def hold(self, on: bool) -> None:
        """Let new requests wait while nobody answers, or refuse them at once."""
        ...

    async def drained(self, address: str, timeout: float) -> None:
        """Wait until no answer comes from `address` any more, at most `timeout` seconds."""
        ...


@dataclass
class _Seen:
    """What this daemon has seen of one engine process since it has served these weights, and does with it now."""

    begun: float = field(default_factory=time.monotonic)
    ready_since: float | None = None
    answered: float | None = None
    fresh: bool = False
    fault: str = ""
    before: str = ""
    asleep: bool = False
    adapter: AdapterView | None = None
    replay: ReplayView | None = None
    repeated: tuple[bool, str] = (False, "")
    """Whether its release may be served by what it repeated, and what is said of that."""
    doing: asyncio.Task[None] | None = None


class EngineProcesses:
    """`changed` is called when something has happened that decisions rest on.

    Answers that have begun may go on for `drain_seconds` when their engine is to stop or to change its weights.
    """

    def __init__(
        self,
        home: Home,
        kind: EngineKind,
        releases: Releases,
        records: Processes,
        frontage: Frontage,
        drain_seconds: float,
        changed: Callable[[], None],
    ) -> None:
        self.kind = kind
        self.models = ServedModels(home, kind, releases)
        self.failures: dict[str, Failure] = {}
        """By release, those in a row."""
        self._home = home
        self._releases = releases
        self._records = records
        self._frontage = frontage
        self._drain_seconds = drain_seconds
        self._changed = changed
        self._seen: dict[str, _Seen] = {}
        """By the process's address."""
        self._unstarted: dict[str, str] = {}
        """Releases for which no process could be started, and why."""
        self._unswappable: set[str] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._sleep = Sleep(kind)
        self._kernel_kills = processes.kernel_kills()

    def rows(self) -> list[ProcessRow]:
        return [row for row in self._records.all() if row.kind == "engine"]

    def row(self, release: str) -> ProcessRow:
        """The process that serves `release`. Raises KeyError where there is none."""
        return {row.owner: row for row in self.rows()}[release]

    # Looking

    async def listen(self) -> None:
        """Ask every engine whether it answers. What this process could not ask is not held against an engine."""
        rows = [row for row in self.rows() if row.life in ("starting", "ready") and not self._of(row).doing]
        answers = await asyncio.gather(*(self.kind.ready(row.address) for row in rows), return_exceptions=True)
        for row, answer in zip(rows, answers, strict=True):
            seen, now = self._of(row), time.monotonic()
            if isinstance(answer, OSError) and not isinstance(answer, ConnectionError):
                log.warning("cannot ask the engine of %s whether it answers: %s", row.owner, answer)
                seen.begun, seen.answered = now, None if seen.answered is None else now
            elif answer is True:
                self._sleep.started |= seen.fresh
                seen.answered = now
                if seen.ready_since is None:
                    seen.ready_since = now
                    self._put(row, "ready")

    def views(self) -> tuple[EngineView, ...]:
        """The engines as decisions see them."""
        views = [self._view(row, time.monotonic()) for row in self.rows()]
        present = {view.release for view in views}
        unstarted = [(release, why) for release, why in self._unstarted.items() if release not in present]
        return (*views, *(EngineView(release, "failed", why) for release, why in unstarted))

    def shown(self) -> tuple[api.Engine, ...]:
        """The engines as people see them."""
        pids, now = {row.owner: row.pid for row in self.rows()}, time.monotonic()
        views = {view.release: view for view in self.views()}
        resting = (EngineView(release, "failed") for release, one in self.failures.items() if rests(one, now))
        return tuple(
            api.Engine(
                release=view.release,
                kind=self.kind.name,
                state=view.life,
                pid=pids.get(view.release) or None,
                restarts=failure.count if failure else 0,
                reason=view.reason or (failure.reason if failure else ""),
            )
            for view in ({one.release: one for one in resting} | views).values()
            for failure in [self.failures.get(view.release)]
        )

    def swappable(self, live: str | None) -> frozenset[str]:
        """Releases with an engine that could go on with the weights of the live release, which has none of its own."""
        owners = {row.owner for row in self.rows()}
        if not self.kind.reloads or live is None or live in owners | self._unswappable:
            return frozenset()
        return frozenset(owner for owner in owners if self.models.alike(owner, live))

    @property
    def sleeps(self) -> bool:
        """Whether an engine can sleep, and it could be seen how much memory it keeps."""
        return self._sleep.possible

    def wakeable(self, releases: Iterable[str]) -> frozenset[str]:
        """Of `releases` those with whose weights the engine that sleeps could go on."""
        sleeper = next((row.owner for row in self.rows() if row.life == "sleeping"), None)
        if sleeper is None or not self.kind.reloads:
            return frozenset()
        return frozenset(
            release
            for release in releases
            if release not in self._unswappable
            and self.models.alike(sleeper, release)
            and self.models.could_be_told(release)
        )

    def room(self, releases: Iterable[str]) -> bool:
        """Whether the memory lets an engine start for the largest of `releases`, as far as is known."""
        needed = max(map(self.models.memory, releases), default=0)
        free = hardware.free_memory()
        return free is None or needed <= free

    def held(self) -> int:
        """Bytes that engines hold and that a worker will have: they stop for it, or keep what they keep asleep."""
        awake = {pid for row in self.rows() if row.life != "sleeping" for pid in processes.members(row)}
        return max(0, hardware.held_by(awake) - self._sleep.kept)

    def log(self, release: str) -> Path:
        return self._home.engines / f"{release}.log"

    # Acting

    def start(self, release: str) -> None:
        """Start a process for the release. Where that cannot be done the release has an engine that has failed.

        Raises sqlite3.Error where the process could not be recorded; then none runs.
        """
        # A name of its own: the process may go on with another release's weights while this one starts again.
        socket, models = self._home.engine_socket(), self.models
        try:
            directory, template = models.directory(release), models.template(release)
            command = self.kind.command(directory, release, socket, template, models.precision(release))
            self._sleep.before_start()
            row = processes.new_row("engine", release, address=command.address)
            self._seen[row.address] = _Seen(fresh=True)
            environment = {**os.environ, **command.environment, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
            processes.start(self._records, row, command.argv, environment, self.log(release), self._home.root)
        except sqlite3.Error:
            self._seen.pop(f"unix:{socket}", None)
            raise
        except Exception as error:
            log.exception("no engine could be started for %s", release)
            self._unstarted[release] = f"could not be started: {reason(error)}"

    def stop(self, release: str, failure: Failure | None) -> None:
        """Let its answers end, then its whole process group. `failure`: what is held against its release from now on.

        Raises sqlite3.Error where that could not be recorded; then nothing was done.
        """
        row = next((row for row in self.rows() if row.owner == release), None)
        seen = self._of(row) if row else None
        if seen and seen.doing:
            return
        if row and seen:
            drains = seen.ready_since is not None and processes.alive(row)
            row = self._record(row, "draining")
            self._do(seen, self._stop(row, seen, drains))
        self._unstarted.pop(release, None)
        if failure is None:
            self.failures.pop(release, None)
        else:
            self.failures[release] = failure
            self._tell_of(release, failure)

    def sleep(self, release: str) -> None:
        """Let its answers end, then its process give the memory back."""
        # On record first: it says that it is healthy while it sleeps, and the next daemon would believe it.
        row = self._record(self.row(release), "draining")
        seen = self._seen[row.address] = _Seen()
        self._do(seen, self._fall_asleep(row, seen))

    def swap(self, old: str, new: str) -> None:
        """Let the answers of `old` end, then load the weights of `new` into its process. One that sleeps wakes."""
        before = self.row(old)
        row = replace(before, owner=new, life="waking" if before.life == "sleeping" else "swapping")
        self._records.replace(before, row)
        seen = self._seen[row.address] = _Seen()
        self._do(seen, self._exchange(row, seen, old))

    def load_adapter(self, release: str, run: str, files: Path, name: str) -> None:
        """Give the engine of `release` the adapter of `run` as model `name`."""
        row = self.row(release)
        seen = self._of(row)
        seen.adapter = AdapterView(run, "loading")
        self._ask(self._load_adapter(row, seen, files, name))

    def forget_refusals(self) -> None:
        """Let an adapter that an engine has refused be tried once more."""
        for seen in self._seen.values():
            if seen.adapter and seen.adapter.state == "refused":
                seen.adapter = None

    def replay(self, release: str) -> None:
        """Ask its engine for the reference answers in its manifest."""
        row = self.row(release)
        seen = self._of(row)
        seen.replay = ReplayView("asking", (seen.replay.tries if seen.replay else 0) + 1)
        self._ask(self._replay(row, seen))

    def conclude_replay(self, release: str) -> None:
        """Record what the release has repeated, and what becomes of it."""
        passed, said = self._of(self.row(release)).repeated
        (self._releases.note if passed else self._releases.refuse)(release, said)

    def forgive(self, release: str) -> None:
        """Let its failures count no longer."""
        self.failures.pop(release, None)

    def cancel(self) -> None:
        """End what is under way; the processes stay, and the database says what they are."""
        for task in (*self._asking, *(seen.doing for seen in self._seen.values() if seen.doing)):
            task.cancel()

    # What is under way

    def _do(self, seen: _Seen, effect: Coroutine[Any, Any, None]) -> None:
        """One thing at a time is done with an engine. One with which it did not work has failed."""

        async def see_it_through() -> None:
            try:
                await effect
            except Exception as error:
                known = isinstance(error, ApplianceError | ConnectionError | TimeoutError | sqlite3.Error)
                log.warning("an engine: %s", reason(error), exc_info=None if known else error)
                seen.fault = seen.fault or reason(error)
                await asyncio.sleep(RETRY_SECONDS)
            finally:
                seen.doing = None
                self._changed()

        seen.doing = asyncio.create_task(see_it_through())

    def _ask(self, effect: Awaitable[None]) -> None:
        """Beside all else that is done with an engine."""

        async def ask() -> None:
            await effect
            self._changed()

        task = asyncio.create_task(ask())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _drained(self, row: ProcessRow) -> None:
        """Wait until its answers have ended, as long as they may take."""
        await self._frontage.drained(row.address, self._drain_seconds)

    async def _stop(self, row: ProcessRow, seen: _Seen, drains: bool) -> None:
        if drains:
            await self._drained(row)
        seen.fault = ""
        if left := await processes.stop_group(row, GRACE_SECONDS):
            raise TimeoutError(f"its processes {left} do not end, though they were killed")
        socket = Path(row.address.removeprefix("unix:"))
        socket.unlink(missing_ok=True)
        shutil.rmtree(socket.with_suffix(""), ignore_errors=True)
        self._records.remove(row)
        self._seen.pop(row.address, None)

    async def _fall_asleep(self, row: ProcessRow, seen: _Seen) -> None:
        await self._drained(row)
        try:
            await self._sleep.fall_asleep(row)
        except TimeoutError:
            raise TimeoutError("it has not fallen asleep in time") from None
        self._record(row, "sleeping")
        seen.asleep = True

    async def _exchange(self, row: ProcessRow, seen: _Seen, old: str) -> None:
        """Where it does not work, nobody can say what the engine serves."""
        await (self._sleep.until_it_may_wake() if row.life == "waking" else self._drained(row))
        if wrong := await load_weights(self.kind, self.models, row):
            self._unswappable.add(row.owner)
            seen.fault, seen.before = wrong, old
            return
        with open(self.log(row.owner), "a") as file:
            file.write(f"its weights are served by process {row.pid}, whose log is that of the release it began with\n")
        self._record(row, "ready")
        seen.ready_since = seen.answered = time.monotonic()

    async def _load_adapter(self, row: ProcessRow, seen: _Seen, files: Path, name: str) -> None:
        """An engine that dies meanwhile is started again, and asked again."""
        assert seen.adapter is not None
        begun = time.monotonic()
        try:
            await self.kind.load_adapter(row.address, files, name)
            log.info("the adapter of %s was loaded in %.1f s", seen.adapter.run, time.monotonic() - begun)
            seen.adapter = replace(seen.adapter, state="loaded")
        except Exception as error:
            log.warning("the adapter of %s was not loaded: %s", seen.adapter.run, reason(error))
            if not isinstance(error, ConnectionError) or processes.alive(row):
                why = str(error) if isinstance(error, ConnectionError) else reason(error)
                seen.adapter = replace(seen.adapter, state="refused", reason=why)

    async def _replay(self, row: ProcessRow, seen: _Seen) -> None:
        assert seen.replay is not None
        try:
            seen.repeated = await replay(self.kind, self.models, row)
            seen.replay = replace(seen.replay, state="answered")
        except ConnectionError as error:
            log.warning("the engine went away while %s repeated its reference answers: %s", row.owner, error)
            seen.replay = replace(seen.replay, state="unanswered", at=time.monotonic())

    # What an engine is

    def _of(self, row: ProcessRow) -> _Seen:
        """What is known of the process. One that another daemon has seen ready is not given the time of a start."""
        answered = time.monotonic() if row.life == "ready" else None
        return self._seen.setdefault(row.address, _Seen(answered=answered))

    def _view(self, row: ProcessRow, now: float) -> EngineView:
        seen = self._of(row)
        life: EngineState = row.life or "starting"
        if life in ("starting", "ready"):
            life = "ready" if seen.ready_since else "starting"
        if not row.pid and row.owner not in self._unstarted:
            life = "draining"  # it was ended at once, because it could not be recorded
        fault = "" if seen.doing else self._fault(row, seen, now)
        return EngineView(
            row.owner,
            "failed" if fault else life,
            fault,
            was=life,
            before=seen.before,
            fresh=seen.fresh,
            served=now - seen.ready_since if seen.ready_since else 0.0,
            adapter=seen.adapter,
            replay=seen.replay,
        )

    def _fault(self, row: ProcessRow, seen: _Seen, now: float) -> str:
        """Why the engine has failed, as the rest of a sentence; empty: it has not."""
        if not row.pid:
            return self._unstarted.get(row.owner, "could not be recorded as it was started")
        if not processes.alive(row):
            seen.fault = seen.fault or self._death(row)
        if seen.fault:
            return seen.fault
        match row.life:
            case "draining" | "swapping" | "waking":
                return f"was left {row.life} by a daemon that ended"
            case "sleeping":
                return "" if seen.asleep else "fell asleep under another daemon, and nobody knows how well"
        if seen.answered is not None:
            return f"has not answered for {HUNG_SECONDS:.0f} s" if now - seen.answered > HUNG_SECONDS else ""
        late = now - seen.begun > self.kind.ready_seconds
        return f"was not ready after {self.kind.ready_seconds:.0f} s" if late else ""

    def _death(self, row: ProcessRow) -> str:
        kills, before = processes.kernel_kills(), self._kernel_kills
        self._kernel_kills = kills
        death = explain_death(processes.exit_status(row), kills > before)
        words = last_lines(self.log(row.owner))
        return f"{death.cause}; its log ends with: {words[-1]}" if words else death.cause

    def _tell_of(self, release: str, failure: Failure) -> None:
        log.warning("the engine of %s %s; see %s", release, failure.reason, self.log(release))
        self._sleep.doubt()
        run = self._home.runs / release
        if not run.exists():
            return
        try:
            message, words = f"the engine of {release} {failure.reason}", last_lines(self.log(release))
            EventLog(run / "events.jsonl").append("warning", "probe", code="engine_failed", message=message, log=words)
        except (OSError, ValueError) as error:
            log.warning("that could not be written to the events of %s: %s", release, error)

    def _record(self, row: ProcessRow, life: EngineState) -> ProcessRow:
        """The process at another place in its life. Raises sqlite3.Error where that could not be recorded."""
        now = replace(row, life=life)
        if now != row:
            self._records.add(now)
        return now

    def _put(self, row: ProcessRow, life: EngineState) -> None:
        """The same where nothing hangs on the record."""
        try:
            self._record(row, life)
        except sqlite3.Error as error:
            log.warning("that the engine of %s is %s could not be recorded: %s", row.owner, life, error)
