"""The loop: look, decide, act. All that lasts is in the database and on disk; this object may be killed at any time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sqlite3
import sys
import time
from collections.abc import Callable

from appliance import api
from appliance.canary import Limits
from appliance.home import Home
from appliance.settings import Settings
from appliance.supervisor import processes
from appliance.supervisor.actions import (
    Action,
    Advance,
    CheckRelease,
    Conclude,
    ConcludeReplay,
    EndCanary,
    EndStage,
    EndUnmerged,
    FailRun,
    FallBack,
    ForgetWorker,
    GiveWay,
    Hold,
    KillWorker,
    LoadAdapter,
    ProbeRun,
    RecordAnswer,
    Replay,
    RetryStage,
    Route,
    RouteCanary,
    RunAction,
    SleepEngine,
    Start,
    StartEngine,
    StartWorker,
    StopEngine,
    StopRun,
    StopWorker,
    SwapEngine,
    WarnOfSilence,
)
from appliance.supervisor.clearing import clear_up
from appliance.supervisor.decide import decide
from appliance.supervisor.engine_processes import Frontage
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.operations import Operations
from appliance.supervisor.snapshot import RunView, Snapshot
from appliance.supervisor.trial import Ratings, no_ratings
from appliance.supervisor.unmerged import served_name

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
LEAST_PAUSE_SECONDS = 0.01
"""Between two ticks, whatever there is to do: others have the event loop then."""


class Supervisor(Operations):
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
        drain_seconds: float = Settings.drain_seconds,
        ratings: Ratings = no_ratings,
        worker_command: tuple[str, ...] = (sys.executable, "-m", "appliance.worker"),
    ) -> None:
        super().__init__(home, db, engine, frontage, exclusive, canary_requests, drain_seconds, ratings, worker_command)
        self._frontage = frontage
        self._on_tick = on_tick
        self._holding = False
        self._unwritten = -math.inf

    async def serve(self) -> None:
        """Tick until cancelled. A tick that fails is logged, and the next one tries again."""
        processes.kill_unrecorded(self.home.root, self.processes.all())
        clear_up(self.home, self.runs, self.releases)
        while True:
            try:
                acted = await self.tick()
            except Exception:
                log.exception("a tick failed; trying again")
                acted = False
            self._on_tick()
            await asyncio.sleep(LEAST_PAUSE_SECONDS)
            if not acted:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_SECONDS):
                        await self._poke.wait()
                self._poke.clear()

    async def tick(self) -> bool:
        """One look, decision and round of actions; whether there was something to do, and all of it was done."""
        await self.engines.listen()
        done: list[bool] = []
        for action in decide(self._snapshot()):
            if all(done) or not isinstance(action, Start):
                done.append(self._do(action))
        return bool(done) and all(done)

    def cancel(self) -> None:
        """End what is under way here; the processes stay."""
        self.probes.cancel()
        self.checks.cancel()
        self.engines.cancel()

    async def close(self, grace: float) -> None:
        """Stop everything: workers write a checkpoint and will be started again by the next daemon."""
        self.cancel()
        rows = self.processes.all()
        await asyncio.gather(*(processes.stop_group(row, grace) for row in rows))
        for row in rows:
            self.processes.remove(row)

    # Looking

    def _snapshot(self) -> Snapshot:
        runs = tuple(self._view(run) for run in self.runs.active())
        engines = self.engines.views()
        live = self.releases.live()
        present = {engine.release for engine in engines}
        canary = self.trial.view()
        served = ({live} if live else set()) | ({canary.release} if canary else set())
        to_start = {run.id for run in runs if run.needs_engine} | served
        return Snapshot(
            now=time.monotonic(),
            unwritten=self._unwritten,
            runs=runs,
            workers=self.workers.views(),
            engines=engines,
            failures=dict(self.engines.failures),
            live=live,
            answered=self.releases.answered(),
            fallback=self.releases.fallback(),
            successor=self.releases.successor(),
            unread=frozenset(release for release in served if not self.checks.whole(release)),
            checking=self.checks.under_way,
            unproven=self.releases.unproven(),
            unfit=self.releases.unfit(),
            swappable=self.engines.swappable(live),
            measures=self.engines.kind.measures,
            sleeps=self.engines.sleeps,
            wakeable=self.engines.wakeable(to_start),
            room=not present or self.engines.room(to_start - present),
            routed=self.routed,
            routed_adapter=self.routed_adapter,
            unmerged=self.unmerged.view(),
            canary=canary,
            routed_canary=self.trial.routed,
            holding=self._holding,
            exclusive=self.exclusive,
        )

    def _view(self, run: api.Run) -> RunView:
        assert run.state in ("queued", "running", "stopping")
        outcome, said = self.steps.outcome(run)
        return RunView(
            run.id,
            run.state,
            run.stage,
            outcome,
            self.runs.losses(run.id),
            refused=run.stage == "probe" and outcome == "none" and self.steps.refused(run),
            short_of_memory=outcome == "failed" and said == "out_of_memory",
            fault=said if outcome == "damaged" else "",
            wish=self.runs.wish(run.id),
            ending=self.workers.is_ending(run),
            probe=self.probes.view(run.id),
        )

    # Acting

    def _do(self, action: Action) -> bool:
        """Do it; whether that worked. A run whose action cannot be done fails alone.

        Where the database does not take a record, nobody is to blame, and the action is decided upon anew.
        """
        log.info("%s", action)
        try:
            self._perform(action)
        except sqlite3.OperationalError as error:
            log.error("%s could not be recorded, and is tried again: %s", action, error)
            self._unwritten = time.monotonic()
            return False
        except Exception as error:
            if not isinstance(action, RunAction):
                raise
            self.steps.give_up(action.run, error)
        return True

    def _perform(self, action: Action) -> None:
        match action:
            case StartWorker(run):
                self.workers.start(self.runs.get(run), self._compared_with(run))
            case StopWorker(run):
                self.workers.tell_to_stop(run)
            case KillWorker(run):
                self.workers.kill(run)
            case EndStage(run):
                self.workers.end_stage(self.runs.get(run))
            case WarnOfSilence(run):
                self.workers.warn_of_silence(self.runs.get(run))
            case ForgetWorker(run, lost):
                self.workers.forget(run, lost)
            case Advance(run):
                self.steps.advance(self.runs.get(run))
            case RetryStage(run):
                self.workers.retry(self.runs.get(run))
            case FailRun(run, why, reason):
                self.steps.fail(self.runs.get(run), why, reason, self._what_to_do(run, why))
                self.probes.forget(run)
            case StopRun(run, discard):
                if discard:
                    self.workers.discard(run)
                self.runs.finish(run, "stopped")
                self.probes.forget(run)
            case ProbeRun(run):
                precision = self.engines.models.precision(run)
                self.probes.start(run, self.engines.row(run).address, self.steps.directory(run), precision)
            case Conclude(run):
                self.steps.conclude(self.runs.get(run), self.probes.found(run))
                self.probes.forget(run)
            case StartEngine(release):
                self.engines.start(release)
            case StopEngine(release, failure):
                self.engines.stop(release, failure)
                self.probes.forget(release)
            case SleepEngine(release):
                self.engines.sleep(release)
            case SwapEngine(old, new):
                self.engines.swap(old, new)
                self.probes.forget(old)
            case LoadAdapter(release, run):
                self.engines.load_adapter(release, run, self.unmerged.files(run), served_name(run))
            case EndUnmerged(reason):
                self.unmerged.end(reason)
                self.engines.forget_refusals()
            case FallBack(release, _, reason) if release == self.releases.live():
                log.warning("%s does not go live: %s", release, reason)
                self.releases.give_up(release, reason)
                self.engines.forgive(release)
            case CheckRelease(release):
                self.checks.start(release)
            case Replay(release):
                self.engines.replay(release)
            case ConcludeReplay(release):
                self.engines.conclude_replay(release)
            case GiveWay(release, to, reason) if release == self.releases.live():
                self.releases.give_way(to, reason)
                log.error("%s", self.releases.setback())
                self.engines.forgive(release)
            case Route(release, adapter):
                address = self.engines.row(release).address if release else ""
                self.routed, self.routed_adapter = release, adapter
                if adapter:
                    self._frontage.route(served_name(adapter), address, beneath=release)
                else:
                    self._frontage.route(release, address, beneath=None)
            case RecordAnswer(release) if release == self.releases.live():
                self.releases.mark_answered()
            case RouteCanary(release, share):
                self.trial.route(release, share, self.engines.row(release).address if release else "")
            case EndCanary(outcome, reason):
                self.trial.end(outcome, reason)
            case Hold(on):
                self._holding = on
                self._frontage.hold(on)

    def _what_to_do(self, run: str, why: str) -> str:
        """The next step of a person whose run cannot go on."""
        if why == "damaged":
            return f"`appliance stop {run} --discard`, then `appliance resume {run}` begins it anew"
        return self.probes.found(run).next or f"see `appliance logs {run} --events`, then `appliance resume {run}`"

    def _compared_with(self, run: str) -> str | None:
        """The live release, unless its files are not whole, or are the very ones that are judged."""
        live = self.releases.live()
        return live if live and live != self.steps.recipe(run).rechecks and self.checks.whole(live) else None
