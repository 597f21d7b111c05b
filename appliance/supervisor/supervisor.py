"""The loop: look, decide, act. All that lasts is in the database and on disk; this object may be killed at any time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from appliance import api
from appliance.canary import Limits
from appliance.errors import ApplianceError
from appliance.home import Home, disk_error
from appliance.release.gates import Gate, judge_parity, judge_stopping, load_probes
from appliance.release.manifest import finalise
from appliance.store.canaries import Canaries
from appliance.store.processes import Processes, ProcessRow
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.supervisor import processes
from appliance.supervisor.decide import (
    MOST_CANDIDATE_FAILURES,
    MOST_LOSSES,
    Action,
    Advance,
    Conclude,
    EndCanary,
    EngineView,
    FailRun,
    ForgetWorker,
    Hold,
    KillWorker,
    Outcome,
    ProbeRun,
    Route,
    RouteCanary,
    RunView,
    Snapshot,
    StartEngine,
    StartWorker,
    StopEngine,
    StopRun,
    StopWorker,
    WarnOfSilence,
    decide,
)
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.trial import CanaryRoutes, Trial
from appliance.supervisor.workers import Workers
from appliance.train.events import EventLog
from appliance.train.recipe import Recipe, parse_recipe

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
DRAIN_SECONDS = 30.0
"""How long answers that have begun may go on when their engine is to stop."""
ENGINE_GRACE_SECONDS = 10.0
HUNG_SECONDS = 60.0
"""An engine that was ready and has not answered for so long is restarted."""
LONGEST_REST_SECONDS = 60.0


class Frontage(CanaryRoutes, Protocol):
    """The public face, which the supervisor tells who answers."""

    def route(self, release: str | None, address: str) -> None:
        """Let the engine at `address` answer from now on, or nobody."""
        ...

    def hold(self, on: bool) -> None:
        """Let new requests wait while nobody answers, or refuse them at once."""
        ...

    async def drained(self, address: str, timeout: float) -> None:
        """Wait until no answer comes from `address` any more, at most `timeout` seconds."""
        ...


class Supervisor:
    """Runs stages and engines. `on_tick` is called after each tick: the sign of life for a watchdog."""

    def __init__(
        self,
        home: Home,
        db: sqlite3.Connection,
        engine: EngineKind,
        frontage: Frontage,
        exclusive: bool,
        on_tick: Callable[[], None] = lambda: None,
        canary_requests: int = Limits.requests,
        worker_command: tuple[str, ...] = (sys.executable, "-m", "appliance.worker"),
    ) -> None:
        self.home = home
        self.engine = engine
        self.exclusive = exclusive
        self.runs = Runs(db)
        self.releases = Releases(db)
        self.processes = Processes(db)
        self.workers = Workers(home, self.runs, self.processes, worker_command)
        self.trial = Trial(home, Canaries(db), self.releases, self.processes, frontage, Limits(canary_requests))
        self.routed: str | None = None
        self._holding = False
        self._frontage = frontage
        self._on_tick = on_tick
        self._poke = asyncio.Event()
        self._answered: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self._ready_since: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._rest_until: dict[str, float] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._stops: dict[str, asyncio.Task[None]] = {}

    def poke(self) -> None:
        """Look again now: something has changed."""
        self._poke.set()

    async def serve(self) -> None:
        """Tick until cancelled. A tick that fails is logged, and the next one tries again."""
        processes.kill_unrecorded(self.home.root, self.processes.all())
        while True:
            try:
                acted = await self.tick()
            except Exception:
                log.exception("a tick failed; trying again")
                acted = False
            self._on_tick()
            if not acted:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_SECONDS):
                        await self._poke.wait()
                self._poke.clear()

    async def tick(self) -> bool:
        """One look, decision and round of actions; whether anything was done."""
        await self._listen_to_engines()
        actions = decide(self._snapshot())
        for action in actions:
            self._do(action)
        return bool(actions)

    async def close(self, grace: float) -> None:
        """Stop everything: workers write a checkpoint and will be started again by the next daemon."""
        for task in (*self._probes.values(), *self._stops.values()):
            task.cancel()
        rows = self.processes.all()
        await asyncio.gather(*(processes.stop_group(row, grace) for row in rows))
        for row in rows:
            self.processes.remove(row)

    def engines(self) -> tuple[api.Engine, ...]:
        """The engine processes as people see them."""
        rows = {row.owner: row for row in self.processes.all() if row.kind == "engine"}
        resting = [release for release, until in self._rest_until.items() if until > time.monotonic()]
        return tuple(
            api.Engine(
                release=release,
                kind=self.engine.name,
                state="backoff" if release not in rows else "ready" if release in self._ready_since else "starting",
                pid=rows[release].pid if release in rows else None,
                restarts=self._failures.get(release, 0),
            )
            for release in dict.fromkeys([*rows, *resting])
        )

    def start_canary(self, release: str, share: float) -> api.Canary:
        """Let a release answer a share of the conversations. Raises NotFound, and Conflict where it cannot."""
        canary = self.trial.start(release, share, self.exclusive)
        self._failures.pop(release, None)
        self.poke()
        return canary

    def run_directory(self, run: str) -> Path:
        return self.home.runs / run

    # Looking

    def _snapshot(self) -> Snapshot:
        rows = self.processes.all()
        now = time.monotonic()
        return Snapshot(
            runs=tuple(self._view(run) for run in self.runs.active()),
            workers=self.workers.views(),
            engines=tuple(
                EngineView(
                    row.owner,
                    processes.alive(row),
                    row.owner in self._ready_since,
                    self._overdue(row.owner, now),
                )
                for row in rows
                if row.kind == "engine"
            ),
            live=self.releases.live(),
            routed=self.routed,
            canary=self.trial.view(),
            routed_canary=self.trial.routed,
            holding=self._holding,
            exclusive=self.exclusive,
            probing=frozenset(self._probes),
            stopping_engines=frozenset(self._stops),
            failures=dict(self._failures),
            resting=frozenset(release for release, until in self._rest_until.items() if until > now),
        )

    def _view(self, run: api.Run) -> RunView:
        directory = self.run_directory(run.id)
        outcome: Outcome = "none"
        if run.stage == "probe":
            outcome = "done" if (self.home.releases / run.id / "manifest.json").exists() else "none"
        elif (directory / run.stage / "result.json").exists():
            outcome = "done"
        elif (directory / run.stage / "failure.json").exists():
            outcome = "failed"
        assert run.state in ("queued", "running", "stopping")
        refused = run.stage == "probe" and not _probeable(directory / "verify" / "result.json")
        return RunView(run.id, run.state, run.stage, outcome, self.runs.losses(run.id), refused)

    async def _listen_to_engines(self) -> None:
        rows = [row for row in self.processes.all() if row.kind == "engine" and row.owner not in self._stops]
        answers = await asyncio.gather(*(self.engine.ready(row.address) for row in rows), return_exceptions=True)
        for row, answer in zip(rows, answers, strict=True):
            self._begun.setdefault(row.owner, time.monotonic())
            if answer is True:
                self._ready_since.setdefault(row.owner, time.monotonic())
                self._answered[row.owner] = time.monotonic()

    def _overdue(self, release: str, now: float) -> bool:
        if release in self._answered:
            return now - self._answered[release] > HUNG_SECONDS
        return now - self._begun.get(release, now) > self.engine.ready_seconds

    # Acting

    def _do(self, action: Action) -> None:
        """Do it; a run whose action cannot be done fails by itself and leaves the others alone."""
        log.info("%s", action)
        try:
            self._perform(action)
        except Exception as error:
            if isinstance(action, StartEngine | StopEngine | Route | RouteCanary | EndCanary | Hold):
                raise
            self._give_up(action.run, error)

    def _perform(self, action: Action) -> None:
        match action:
            case StartWorker(run):
                self.workers.start(self.runs.get(run), self.releases.live())
            case StopWorker(run):
                self.workers.tell_to_stop(run)
            case KillWorker(run):
                self.workers.kill(run)
            case WarnOfSilence(run):
                self.workers.warn_of_silence(self.runs.get(run))
            case ForgetWorker(run, lost):
                self.workers.forget(run, lost)
            case Advance(run):
                self._advance(self.runs.get(run))
            case FailRun(run, why):
                self._fail(self.runs.get(run), why)
            case StopRun(run):
                if probe := self._probes.get(run):
                    probe.cancel()
                if self.workers.is_to_discard(run):
                    self.workers.discard(run)
                self.runs.finish(run, "stopped")
            case ProbeRun(run):
                self._probes[run] = asyncio.create_task(self._probe(self.runs.get(run)))
            case Conclude(run):
                self._conclude(self.runs.get(run), {})
            case StartEngine(release):
                self._start_engine(release)
            case StopEngine(release, failed):
                if failed:
                    self._count_failure(release)
                else:
                    self._failures.pop(release, None)
                self._stops[release] = asyncio.create_task(self._stop_engine(self._row("engine", release)))
            case Route(release):
                address = self._row("engine", release).address if release else ""
                self.routed = release
                self._frontage.route(release, address)
            case RouteCanary(release, share):
                self.trial.route(release, share, self._row("engine", release).address if release else "")
            case EndCanary(outcome, reason):
                self.trial.end(outcome, reason)
            case Hold(on):
                self._holding = on
                self._frontage.hold(on)

    def _advance(self, run: api.Run) -> None:
        following = run.stages[run.stages.index(run.stage) + 1]
        self.runs.advance(run.id, following)
        if following == "probe":
            self._events(run.id).append("stage_started", "probe")

    def _fail(self, run: api.Run, why: str) -> None:
        if why == "stage":
            failure = json.loads((self.run_directory(run.id) / run.stage / "failure.json").read_bytes())
            self.runs.finish(run.id, "failed", failure["reason"], failure["next"])
            return
        log: list[str] = []
        if why == "losses":
            death = next(event for event in reversed(self._events(run.id).read()) if "cause" in event)
            reason = f"the {run.stage} process died {MOST_LOSSES} times; the last time it {death['cause']}"
            next_step, log = f"{death['next']}; see `appliance logs {run.id}`", death["log"]
        else:
            reason = f"the engine did not start on the new weights in {MOST_CANDIDATE_FAILURES} attempts"
            next_step = f"see {self.home.engines / (run.id + '.log')}"
        self._events(run.id).append("failed", run.stage, reason=reason, next=next_step, log=log)
        self.runs.finish(run.id, "failed", reason, next_step)

    async def _probe(self, run: api.Run) -> None:
        """Gates 3 and 4 on the real engine. An engine that dies meanwhile is started again, and the probe with it."""
        try:
            probes = load_probes(self.run_directory(run.id))
            address = self._row("engine", run.id).address
            answers = [await self.engine.probe(address, run.id, probe) for probe in probes]
            gates = {"parity": judge_parity(probes, answers), "stopping": judge_stopping(probes, answers)}
            self._conclude(run, gates)
        except ConnectionError as error:
            log.warning("the engine went away while %s was probed: %s", run.id, error)
            await asyncio.sleep(TICK_SECONDS)
        except Exception as error:
            self._give_up(run.id, error)
        finally:
            self._probes.pop(run.id, None)
            self.poke()

    def _give_up(self, run: str, error: Exception) -> None:
        log.error("run %s cannot go on", run, exc_info=error)
        if isinstance(error, OSError):
            error = disk_error(error, self.home.root)
        reason = error.message if isinstance(error, ApplianceError) else f"{type(error).__name__}: {error}"
        next = error.next if isinstance(error, ApplianceError) else "see the daemon's log"
        self.runs.finish(run, "failed", reason, next)

    def _conclude(self, run: api.Run, gates: dict[str, Gate]) -> None:
        """Safe to repeat: a release that has its manifest already is only recorded."""
        events = self._events(run.id)
        for name, gate in gates.items():
            events.append("gate", "probe", gate=name, passed=gate.passed, figures=gate.figures, reason=gate.reason)
        manifest = finalise(self.home, run.id, self.recipe(run.id), gates)
        passed = {name: bool(gate["passed"]) for name, gate in manifest.gates.items()}
        begun = [event["time"] for event in events.read() if event["event"] == "stage_started"]
        events.append("stage_finished", "probe", seconds=round(time.time() - begun[-1], 1))
        self.releases.add(run.id, run.base, manifest.state, manifest.reason, passed, self.runs.promotes(run.id))
        reason = "" if manifest.state == "verified" else f"the release was refused: {manifest.reason}"
        next = "" if manifest.state == "verified" else f"see `appliance releases {run.id}`"
        self.runs.finish(run.id, "finished", reason, next)

    def _start_engine(self, release: str) -> None:
        directory = self.home.releases / release
        if not directory.exists():
            directory = self.run_directory(release) / "merge" / "model"
        command = self.engine.command(directory, release, self.home.engines / f"{_short(release)}.sock")
        self._begun[release] = time.monotonic()
        row = processes.spawn(
            "engine",
            release,
            "",
            command.argv,
            {**os.environ, **command.environment, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            self.home.engines / f"{release}.log",
            self.home.root,
            command.address,
        )
        self.processes.add(row)

    async def _stop_engine(self, row: ProcessRow) -> None:
        try:
            if processes.alive(row) and row.owner in self._ready_since:
                await self._frontage.drained(row.address, DRAIN_SECONDS)
            await processes.stop_group(row, ENGINE_GRACE_SECONDS)
            self.processes.remove(row)
        finally:
            for memory in (self._begun, self._ready_since, self._answered, self._stops):
                memory.pop(row.owner, None)
            self.poke()

    def _count_failure(self, release: str) -> None:
        """Engines that keep failing are started ever more rarely; one that had served for long starts afresh."""
        log.warning("the engine of %s failed; see %s", release, self.home.engines / f"{release}.log")
        served = time.monotonic() - self._ready_since.get(release, time.monotonic())
        failures = 1 if served > LONGEST_REST_SECONDS else self._failures.get(release, 0) + 1
        self._failures[release] = failures
        self._rest_until[release] = time.monotonic() + min(2.0 ** (failures - 1), LONGEST_REST_SECONDS)

    # Reading

    def recipe(self, run: str) -> Recipe:
        """The run's recipe as it was queued."""
        return parse_recipe((self.run_directory(run) / "recipe.toml").read_text())

    def _events(self, run: str) -> EventLog:
        return EventLog(self.run_directory(run) / "events.jsonl")

    def _row(self, kind: str, owner: str) -> ProcessRow:
        return next(row for row in self.processes.all() if (row.kind, row.owner) == (kind, owner))


def _probeable(result: Path) -> bool:
    """Whether verify's result leaves the engine something to say: an operator may accept a failed quality gate."""
    try:
        gates: dict[str, Any] = json.loads(result.read_bytes())["gates"]
    except FileNotFoundError:
        return True
    return all(gate["passed"] for name, gate in gates.items() if name != "quality")


def _short(release: str) -> str:
    """A file name for a socket: its path has to stay short."""
    return hashlib.sha256(release.encode()).hexdigest()[:12]
