"""The loop: look, decide, act. All that lasts is in the database and on disk; this object may be killed at any time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance import api
from appliance.canary import Limits
from appliance.errors import ApplianceError, Conflict, reason
from appliance.home import Home, disk_error, sha256
from appliance.release.conclude import finalise, judge
from appliance.release.gates import Gate, verdicts
from appliance.release.manifest import MANIFEST, Manifest, read_manifest
from appliance.release.recheck import conclude_recheck
from appliance.settings import Settings
from appliance.store.canaries import Canaries
from appliance.store.processes import Processes
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.store.unmerged import UnmergedAdapters
from appliance.supervisor import processes
from appliance.supervisor.actions import (
    Action,
    Advance,
    CheckRelease,
    Conclude,
    EndCanary,
    EndUnmerged,
    FailRun,
    FallBack,
    ForgetWorker,
    GiveWay,
    Hold,
    KillWorker,
    LoadAdapter,
    ProbeRun,
    Replay,
    RetryStage,
    Route,
    RouteCanary,
    RunAction,
    SleepEngine,
    StartEngine,
    StartWorker,
    StopEngine,
    StopRun,
    StopWorker,
    SwapEngine,
    WarnOfSilence,
)
from appliance.supervisor.checks import Checks
from appliance.supervisor.decide import MOST_CANDIDATE_FAILURES, MOST_LOSSES, decide
from appliance.supervisor.engine_processes import EngineProcesses, Frontage
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.probing import ask_gates
from appliance.supervisor.snapshot import Outcome, RunView, Snapshot
from appliance.supervisor.trial import Ratings, Trial, no_ratings
from appliance.supervisor.unmerged import Unmerged, served_name
from appliance.supervisor.workers import Workers
from appliance.train.events import EventLog
from appliance.train.recipe import Recipe, parse_recipe

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
ADAPTER_SECONDS = 60.0
"""How long a promotion of an adapter waits to see it answer; it goes on where an engine takes longer."""


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
        drain_seconds: float = Settings.drain_seconds,
        ratings: Ratings = no_ratings,
        worker_command: tuple[str, ...] = (sys.executable, "-m", "appliance.worker"),
    ) -> None:
        self.home = home
        self.exclusive = exclusive
        self.runs = Runs(db)
        self.releases = Releases(db)
        self.processes = Processes(db)
        self.workers = Workers(home, self.runs, self.processes, worker_command)
        self.checks = Checks(home, self.releases, self.poke)
        self.engines = EngineProcesses(home, engine, self.releases, self.processes, frontage, drain_seconds, self.poke)
        self.trial = Trial(Canaries(db), self.releases, ratings, frontage, Limits(canary_requests))
        self.unmerged = Unmerged(home, UnmergedAdapters(db), self.releases)
        self.routed: str | None = None
        self.routed_adapter: str | None = None
        self._holding = False
        self._frontage = frontage
        self._on_tick = on_tick
        self._poke = asyncio.Event()
        self._probes: dict[str, asyncio.Task[None]] = {}

    def poke(self) -> None:
        """Look again now: something has changed."""
        self._poke.set()

    def promote(self, release: str) -> api.Release:
        """Make a verified release live, if its files are whole. Raises NotFound, or Conflict for an unfit one."""
        promoted = self.releases.promote(release)
        self.engines.failures.pop(promoted.id, None)
        self.poke()
        return promoted

    def rollback(self) -> api.Release:
        """End the canary or the unmerged adapter, or else make the release live that was before.

        Raises Conflict where there is none of them.
        """
        if unmerged := self.adapter_status():
            self.runs.set_promotes(unmerged.run, False)
            self.unmerged.end("by hand")
            self.poke()
            return self.releases.get(unmerged.live)
        if canary := self.trial.status():
            self.trial.end("rolled back", "by hand")
            self.poke()
            return self.releases.get(canary.live)
        release = self.releases.rollback()
        self.engines.failures.pop(release.id, None)
        self.poke()
        return release

    async def promote_adapter(self, run_id: str) -> api.Unmerged:
        """Let the adapter of a run answer now, and its release as soon as it is verified.

        Raises NotFound; Conflict and InvalidInput where that cannot be, or the engine does not take the adapter.
        """
        run = self.runs.get(run_id)
        if not self.engines.kind.adapter_rank:
            raise Conflict(
                "no_adapters",
                f"the engine {self.engines.kind.name} serves merged weights only",
                "start with vLLM and APPLIANCE_ADAPTER_RANK=32 (or the adapter's own rank), or wait for the release",
            )
        if self.exclusive:
            raise Conflict(
                "no_room",
                "the lease is exclusive: no engine runs while an adapter is merged and verified",
                "set APPLIANCE_LEASE=share where the memory allows, or wait for the release",
            )
        if canary := self.trial.view():
            raise Conflict("canary_under_way", f"{canary.release} is the canary", "wait until it has ended, or end it")
        live = self.unmerged.require_possible(run)
        rank = self.engines.kind.adapter_rank
        await asyncio.to_thread(self.unmerged.write, run_id, live, self.recipe(run_id), rank)
        self.unmerged.start(run_id, live)
        started = self.unmerged.status(answers=False)
        self.runs.set_promotes(run_id, True)
        self.poke()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADAPTER_SECONDS):
                while self.routed_adapter != run_id and not self.unmerged.ended_because(run_id):
                    await asyncio.sleep(0.02)
        now = self.adapter_status() or (started if self.releases.live() == run_id else None)
        if now is None:
            raise Conflict("not_loaded", self.unmerged.ended_because(run_id), f"see {self.engines.log(live)}")
        return now

    def adapter_status(self) -> api.Unmerged | None:
        """The adapter that answers, or is about to, before its release can."""
        return self.unmerged.status(answers=self.routed_adapter is not None)

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
        await self.engines.listen()
        actions = decide(self._snapshot())
        for action in actions:
            self._do(action)
        return bool(actions)

    def cancel(self) -> None:
        """End what is under way here; the processes stay."""
        for task in self._probes.values():
            task.cancel()
        self.checks.cancel()
        self.engines.cancel()

    async def close(self, grace: float) -> None:
        """Stop everything: workers write a checkpoint and will be started again by the next daemon."""
        self.cancel()
        rows = self.processes.all()
        await asyncio.gather(*(processes.stop_group(row, grace) for row in rows))
        for row in rows:
            self.processes.remove(row)

    def start_canary(self, release: str, share: float) -> api.Canary:
        """Let a release answer a share of the conversations. Raises NotFound, and Conflict where it cannot."""
        if unmerged := self.adapter_status():
            raise Conflict(
                "adapter_under_way",
                f"the adapter of {unmerged.run} answers, unmerged",
                "wait until its release is live, or end it: `appliance rollback`",
            )
        present = any(row.owner == release for row in self.engines.rows())
        canary = self.trial.start(release, share, room=not self.exclusive and (present or self.engines.room([release])))
        self.engines.failures.pop(release, None)
        self.poke()
        return canary

    def run_directory(self, run: str) -> Path:
        return self.home.runs / run

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
            runs=runs,
            workers=self.workers.views(),
            engines=engines,
            live=live,
            fallback=self.releases.fallback(),
            successor=self.releases.successor(),
            unread=frozenset(release for release in served if not self.checks.whole(release)),
            checking=self.checks.under_way,
            unproven=self.releases.unproven(),
            replaying=self.engines.replaying,
            unfit=self.releases.unfit(),
            swappable=self.engines.swappable(live),
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
            probing=frozenset(self._probes),
            stopping_engines=self.engines.stopping,
            failures=dict(self.engines.failures),
            resting=self.engines.resting,
        )

    def _view(self, run: api.Run) -> RunView:
        directory = self.run_directory(run.id)
        outcome: Outcome = "none"
        short_of_memory = False
        if run.stage == "probe":
            outcome = "done" if (self.home.releases / run.id / "manifest.json").exists() else "none"
        elif (directory / run.stage / "result.json").exists():
            outcome = "done"
        elif (directory / run.stage / "failure.json").exists():
            outcome = "failed"
            short_of_memory = self._failure(run)["code"] == "out_of_memory"
        assert run.state in ("queued", "running", "stopping")
        refused = run.stage == "probe" and not _probeable(directory / "verify" / "result.json")
        return RunView(run.id, run.state, run.stage, outcome, self.runs.losses(run.id), refused, short_of_memory)

    # Acting

    def _do(self, action: Action) -> None:
        """Do it. A run whose action cannot be done, or an engine that cannot be started, fails alone."""
        log.info("%s", action)
        try:
            self._perform(action)
        except Exception as error:
            if isinstance(action, StartEngine):
                log.exception("no engine could be started for %s", action.release)
                self.engines.start_failed(action.release)
            elif isinstance(action, RunAction):
                self._give_up(action.run, error)
            else:
                raise

    def _perform(self, action: Action) -> None:
        match action:
            case StartWorker(run):
                self.workers.start(self.runs.get(run), self._compared_with(run))
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
            case RetryStage(run):
                self.workers.retry(self.runs.get(run))
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
                self.engines.start(release)
            case StopEngine(release, failed):
                self.engines.stop(release, failed)
            case SleepEngine(release):
                self.engines.sleep(release)
            case SwapEngine(old, new):
                self.engines.swap(old, new)
            case LoadAdapter(release, run):
                files, name = self.unmerged.files(run), served_name(run)
                self.engines.load_adapter(release, run, files, name, failed=self.unmerged.end)
            case EndUnmerged(reason):
                self.unmerged.end(reason)
            case FallBack():
                failing = str(self.releases.live())
                self.engines.give_up(failing, f"its engine does not start; see {self.engines.log(failing)}")
            case CheckRelease(release):
                self.checks.start(release)
            case Replay(release):
                self.engines.replay(release)
            case GiveWay(to, reason):
                self._give_way(str(self.releases.live()), to, reason)
            case Route(release, adapter):
                address = self.engines.row(release).address if release else ""
                self.routed, self.routed_adapter = release, adapter
                if adapter:
                    self._frontage.route(served_name(adapter), address, beneath=release)
                else:
                    self._frontage.route(release, address, beneath=None)
                if release and release == self.releases.live():
                    self.releases.mark_answered()
            case RouteCanary(release, share):
                self.trial.route(release, share, self.engines.row(release).address if release else "")
            case EndCanary(outcome, reason):
                self.trial.end(outcome, reason)
            case Hold(on):
                self._holding = on
                self._frontage.hold(on)

    def _give_way(self, live: str, to: str | None, reason: str) -> None:
        self.releases.give_way(to, reason)
        log.error("%s", self.releases.setback())
        self.engines.forgive(live)

    def _advance(self, run: api.Run) -> None:
        place = run.stages.index(run.stage) + 1
        if place == len(run.stages):
            self.runs.finish(run.id, "finished")
            return
        following = run.stages[place]
        self.runs.advance(run.id, following)
        if following == "probe":
            self._events(run.id).append("stage_started", "probe")

    def _fail(self, run: api.Run, why: str) -> None:
        if why == "stage":
            failure = self._failure(run)
            self.runs.finish(run.id, "failed", failure["reason"], failure["next"])
            return
        log: list[str] = []
        if why == "losses":
            death = next(event for event in reversed(self._events(run.id).read()) if "cause" in event)
            reason = f"the {run.stage} process died {MOST_LOSSES} times; the last time it {death['cause']}"
            next_step, log = f"{death['next']}; see `appliance logs {run.id}`", death["log"]
        else:
            attempts = f"in {MOST_CANDIDATE_FAILURES} attempts"
            reason = f"the engine did not start on the new weights, or not answer its probes, {attempts}"
            next_step = f"see {self.engines.log(run.id)}"
        self._events(run.id).append("failed", run.stage, reason=reason, next=next_step, log=log)
        self.runs.finish(run.id, "failed", reason, next_step)

    async def _probe(self, run: api.Run) -> None:
        """The gates on the real engine. One that dies or falls silent is started again, and the probe with it.

        An engine that has served other weights refuses no release: then one of its own is asked.
        """
        try:
            kind, address = self.engines.kind, self.engines.row(run.id).address
            precision = self.engines.precision(run.id)
            gates, said = await ask_gates(kind, address, run.id, self.run_directory(run.id), precision)
            wrong = [gate.reason for gate in gates.values() if not gate.passed]
            if not (wrong and self.engines.start_afresh(run.id, "; ".join(wrong))):
                self._conclude(run, gates, {"engine": kind.name, "precision": precision, "answers": said})
        except ConnectionError as error:
            log.warning("the engine went away while %s was probed: %s", run.id, error)
            self.engines.stop_silent(run.id)
            await asyncio.sleep(TICK_SECONDS)
        except Exception as error:
            if not self.engines.start_afresh(run.id, reason(error)):
                self._give_up(run.id, error)
        finally:
            self._probes.pop(run.id, None)
            self.poke()

    def _give_up(self, run: str, error: Exception) -> None:
        log.error("run %s cannot go on", run, exc_info=error)
        if isinstance(error, OSError):
            error = disk_error(error, self.home.root)
        next = error.next if isinstance(error, ApplianceError) else "see the daemon's log"
        self.runs.finish(run, "failed", reason(error), next)

    def _conclude(self, run: api.Run, gates: dict[str, Gate], reference: dict[str, Any] | None = None) -> None:
        """Safe to repeat: a release that has its manifest already is only recorded."""
        events = self._events(run.id)
        for name, gate in gates.items():
            events.append("gate", "probe", gate=name, passed=gate.passed, figures=gate.figures, reason=gate.reason)
        recipe = self.recipe(run.id)
        if recipe.rechecks:
            self._conclude_recheck(run, recipe.rechecks, judge(self.home, run.id, recipe, gates))
            return
        manifest = finalise(self.home, run.id, recipe, gates, reference)
        self._end_probe(run.id)
        digest, promote = sha256(self.home.releases / run.id / MANIFEST), self.runs.promotes(run.id)
        passed = verdicts(manifest.gates)
        self.releases.add(run.id, run.base, manifest.state, manifest.reason, passed, promote, digest)
        reason = "" if manifest.state == "verified" else f"the release was refused: {manifest.reason}"
        next = "" if manifest.state == "verified" else f"see `appliance releases {run.id}`"
        self.runs.finish(run.id, "finished", reason, next)

    def _conclude_recheck(self, run: api.Run, release: str, found: Manifest) -> None:
        self._end_probe(run.id)
        damaged, seen = self.releases.get(release).damage, self.releases.proof(release).seen
        if damaged or (seen and not self.checks.whole(release)):
            reason = f"something has written to the files of {release} while its gates were repeated"
            self.runs.finish(run.id, "failed", reason, f"`appliance verify {release}` says whether they are whole")
            return
        manifest, gates = read_manifest(self.home, release), verdicts(found.gates)
        outcome, said = conclude_recheck(found, manifest)
        if outcome == "passed":
            self.releases.passed_here(release, manifest["reason"], said, gates)
            self.runs.finish(run.id, "finished")
            return
        if outcome == "refused":
            log.error("release %s does not pass its gates here: %s", release, found.reason)
            self.releases.refuse(release, said, gates)
        else:
            self.releases.note(release, said)
        reason = f"{release} did not pass again: {found.reason}"
        self.runs.finish(run.id, "finished", reason, f"see `appliance logs {run.id} --events`")

    def _end_probe(self, run: str) -> None:
        events = self._events(run)
        begun = [event["time"] for event in events.read() if event["event"] == "stage_started"]
        events.append("stage_finished", "probe", seconds=round(time.time() - begun[-1], 1))

    # Reading

    def _compared_with(self, run: str) -> str | None:
        """The live release, unless its files are not whole, or are the very ones that are judged."""
        live = self.releases.live()
        return live if live and live != self.recipe(run).rechecks and self.checks.whole(live) else None

    def recipe(self, run: str) -> Recipe:
        """The run's recipe as it was queued."""
        return parse_recipe((self.run_directory(run) / "recipe.toml").read_text())

    def _failure(self, run: api.Run) -> dict[str, str]:
        """Why its present stage cannot go on, as the worker has said."""
        failure: dict[str, str] = json.loads((self.run_directory(run.id) / run.stage / "failure.json").read_bytes())
        return failure

    def _events(self, run: str) -> EventLog:
        return EventLog(self.run_directory(run) / "events.jsonl")


def _probeable(result: Path) -> bool:
    """Whether verify's result leaves the engine something to say: an operator may accept a failed quality gate."""
    try:
        gates: dict[str, Any] = json.loads(result.read_bytes())["gates"]
    except FileNotFoundError:
        return True
    return all(gate["passed"] for name, gate in gates.items() if name != "quality")
