"""A world under `decide`: processes, workers, probes, files and a clock, in which whatever can go wrong does.

`live_through` lets one random history happen and asserts what must hold at each moment of it, and in the end: after the
last fault the world comes to rest, every run has ended, and the live release answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from appliance.canary import Comparison, Tally
from appliance.supervisor import actions as do
from appliance.supervisor.decide import LONGEST_REST_SECONDS, MOST_LOSSES, WRITE_REST_SECONDS
from appliance.supervisor.snapshot import (
    AdapterView,
    CanaryView,
    EngineView,
    Failure,
    ProbeView,
    ReplayView,
    RunView,
    Snapshot,
    UnmergedView,
    WorkerView,
)

Decide = Callable[[Snapshot], list[do.Action]]
TICK = 0.5
FAULTY_TICKS = 120
QUIET_TICKS = 1200
STAGES = ("sft", "merge", "verify", "probe")


class Unwritable(Exception):
    """The database has not taken what was to be written."""


@dataclass
class Engine:
    """One process, or the attempt at one."""

    view: EngineView
    process: bool = True
    ready_at: float = math.inf
    ready_since: float | None = None
    until: float = math.inf
    """When what is done with it ends, and how."""
    then: Callable[[], None] = lambda: None


@dataclass
class Worker:
    view: WorkerView
    ends_at: float
    leaves: str
    told_at: float = math.inf
    killed_at: float = -math.inf
    stubborn_until: float = -math.inf


@dataclass
class Release:
    broken: bool = False
    """No engine ever starts on it."""
    damaged: bool = False
    unread: bool = True
    unproven: bool = False
    refused: bool = False


@dataclass
class Deployment:
    release: str
    answered: bool = False
    counts: bool = True


@dataclass
class World:
    """`faults` says whether things may go wrong now."""

    chance: random.Random
    exclusive: bool
    sleeps: bool
    measures: bool
    swaps: bool
    roomy: bool
    faults: bool = True
    now: float = 0.0
    unwritten: float = -math.inf
    runs: dict[str, RunView] = field(default_factory=dict)
    promotes: dict[str, bool] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    releases: dict[str, Release] = field(default_factory=dict)
    deployments: list[Deployment] = field(default_factory=list)
    checking: dict[str, float] = field(default_factory=dict)
    answering: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    canary: CanaryView | None = None
    unmerged: UnmergedView | None = None
    routed: str | None = None
    routed_adapter: str | None = None
    routed_canary: tuple[str, float] | None = None
    holding: bool = False
    unswappable: set[str] = field(default_factory=set)
    doomed: dict[str, Literal["worker", "engine"]] = field(default_factory=dict)
    """Runs whose workers always die, or on whose weights no engine ever starts."""
    number: int = 0

    # What is

    def live(self) -> str | None:
        return next((one.release for one in reversed(self.deployments) if one.counts), None)

    def _counting(self) -> list[Deployment]:
        return [one for one in self.deployments if one.counts]

    def fit(self, release: str) -> bool:
        return not (self.releases[release].damaged and not self.releases[release].unread) and not (
            self.releases[release].refused
        )

    def successor(self) -> str | None:
        others = [one.release for one in reversed(self._counting()) if one.release != self.live()]
        others += [release for release in reversed(self.releases) if release != self.live()]
        failed = {one.release for one in self.deployments if not one.counts}
        return next((one for one in others if self.fit(one) and one not in failed), None)

    def snapshot(self) -> Snapshot:
        live, counting = self.live(), self._counting()
        served = {one for one in (live, self.canary and self.canary.release) if one}
        waiting = len(counting) > 1 and not counting[-1].answered
        sleeper = next((one for one, engine in self.engines.items() if engine.view.life == "sleeping"), None)
        candidates = {run.id for run in self.runs.values() if run.needs_engine}
        could_swap = self.swaps and live and live not in self.engines and live not in self.unswappable
        return Snapshot(
            now=self.now,
            unwritten=self.unwritten,
            runs=tuple(self.runs.values()),
            workers=tuple(self._worker_view(worker) for worker in self.workers.values()),
            engines=tuple(self._engine_view(engine) for engine in self.engines.values()),
            failures=dict(self.failures),
            live=live,
            answered=counting[-1].answered if counting else True,
            fallback=counting[-2].release if waiting else None,
            successor=self.successor(),
            unread=frozenset(one for one in served if self.releases[one].unread),
            checking=frozenset(self.checking),
            unproven=frozenset(one for one, release in self.releases.items() if release.unproven),
            unfit={one: "damaged" for one in self.releases if not self.fit(one)},
            swappable=frozenset(self.engines) if could_swap else frozenset(),
            sleeps=self.sleeps,
            measures=self.measures,
            wakeable=frozenset(served | candidates) - self.unswappable if sleeper else frozenset(),
            room=self.roomy or not self.engines,
            routed=self.routed,
            routed_adapter=self.routed_adapter,
            unmerged=self.unmerged,
            canary=self.canary,
            routed_canary=self.routed_canary,
            holding=self.holding,
            exclusive=self.exclusive,
        )

    def _worker_view(self, worker: Worker) -> WorkerView:
        overdue = self.now - worker.told_at > 5
        return replace(worker.view, overdue=overdue, killed=self.now - worker.killed_at < 5)

    def _engine_view(self, engine: Engine) -> EngineView:
        served = self.now - engine.ready_since if engine.ready_since is not None else 0.0
        return replace(engine.view, served=served)

    # What happens

    def goes_wrong(self, chance: float) -> bool:
        return self.faults and self.chance.random() < chance

    def pass_time(self) -> None:
        self.now += TICK
        for release in [one for one, at in self.checking.items() if at <= self.now]:
            del self.checking[release]
            if not self.goes_wrong(0.1):
                self.releases[release].unread = False
        for worker in list(self.workers.values()):
            self._let_work(worker)
        for engine in list(self.engines.values()):
            self._let_run(engine)
        due = [one for one in self.answering if one[0] <= self.now]
        self.answering = [one for one in self.answering if one[0] > self.now]
        for _, said in due:
            said()

    def _let_work(self, worker: Worker) -> None:
        run = self.runs.get(worker.view.run)
        if not worker.view.alive:
            return
        obeys = worker.told_at <= self.now and worker.stubborn_until <= self.now
        killed = worker.killed_at > 0 and worker.stubborn_until <= self.now
        if obeys or killed or self.goes_wrong(0.03):
            worker.view = replace(worker.view, alive=False)
        elif worker.ends_at <= self.now or (run and run.ending):
            worker.view = replace(worker.view, alive=False)
            if run and worker.leaves != "nothing":
                short = worker.leaves == "short of memory"
                outcome: Any = "failed" if short else worker.leaves
                refused = run.stage == "verify" and self.goes_wrong(0.1)
                self.runs[run.id] = replace(
                    run,
                    outcome=outcome,
                    short_of_memory=short,
                    fault="cut" if outcome == "damaged" else "",
                    refused=refused,
                )

    def _let_run(self, engine: Engine) -> None:
        view = engine.view
        if engine.until <= self.now:
            engine.until = math.inf
            engine.then()
        elif view.life == "starting" and engine.ready_at <= self.now:
            self._become(engine, life="ready")
            engine.ready_since = self.now
        elif view.life in ("starting", "ready", "sleeping") and self.goes_wrong(0.02):
            self._fail(engine, "has died")

    def _become(self, engine: Engine, **changes: Any) -> None:
        engine.view = replace(engine.view, **changes)

    def _fail(self, engine: Engine, reason: str) -> None:
        self._become(engine, life="failed", was=engine.view.life, reason=reason, adapter=None, replay=None)

    def restart_daemon(self) -> None:
        """Its memory is lost, and what it was at."""
        self.failures, self.checking, self.answering, self.unswappable = {}, {}, [], set()
        self.routed = self.routed_adapter = self.routed_canary = None
        self.holding, self.unwritten = False, -math.inf
        for release, engine in list(self.engines.items()):
            if not engine.process:
                del self.engines[release]
            elif engine.view.life in ("draining", "swapping", "waking", "sleeping"):
                engine.until = math.inf
                self._fail(engine, "was left by a daemon that ended")
            elif engine.view.life == "ready":
                self._become(engine, life="starting")
                engine.ready_at, engine.ready_since = self.now + 1, None
            self._become(engine, before="", adapter=None, replay=None, fresh=False)
        for worker in self.workers.values():
            worker.view = replace(worker.view, told_to_stop=False)
            worker.told_at = worker.told_at if worker.view.alive is False else math.inf
        for run in list(self.runs.values()):
            self.runs[run.id] = replace(run, probe=None)

    def interfere(self) -> None:
        """An operator does something, or something happens to files."""
        match self.chance.randrange(14):
            case 0 | 1 | 2 if len(self.runs) < 3:
                self.number += 1
                run = f"r{self.number}"
                self.runs[run] = RunView(run, "queued", "sft")
                self.promotes[run] = self.chance.random() < 0.7
                if self.chance.random() < 0.2:
                    self.doomed[run] = self.chance.choice(["worker", "engine"])
                self.releases.pop(run, None)
            case 3 if self.runs:
                run = self.chance.choice(list(self.runs))
                wish: Literal["pause", "discard"] = self.chance.choice(["pause", "discard"])
                self.runs[run] = replace(self.runs[run], state="stopping", wish=wish)
            case 4 if self.runs:
                run = self.chance.choice(list(self.runs))
                if self.runs[run].stage == "sft" and self.runs[run].state == "running":
                    self.runs[run] = replace(self.runs[run], wish="keep")
            case 5 | 6 if self.releases:
                release = self.chance.choice(list(self.releases))
                if self.fit(release) and release != self.live():
                    self.deployments.append(Deployment(release))
                    self.failures.pop(release, None)
            case 7 if len(self._counting()) > 1 and self.fit(self._counting()[-2].release):
                self.deployments.remove(self._counting()[-1])
                self.failures.pop(str(self.live()), None)
            case 8 if self.releases and self.live() and not self.canary and not self.unmerged:
                release = self.chance.choice(list(self.releases))
                if self.fit(release) and release != self.live():
                    tallies = Tally(requests=100), Tally(requests=self.chance.choice([0, 100]))
                    tallies[1].errors = self.chance.choice([0, tallies[1].requests])
                    self.canary = CanaryView(release, str(self.live()), 0.1, Comparison("", "", *tallies))
                    self.failures.pop(release, None)
            case 9 if self.live() and not self.unmerged and not self.canary and not self.exclusive:
                merging = [run.id for run in self.runs.values() if run.state == "running" and run.stage == "merge"]
                if merging:
                    self.unmerged = UnmergedView(merging[0], str(self.live()))
                    self.promotes[merging[0]] = True
            case 10 if self.releases:
                release = self.releases[self.chance.choice(list(self.releases))]
                release.unread, release.damaged = True, self.chance.random() < 0.2
            case 11 if self.live():
                self.number += 1
                elsewhere = Release(unproven=True, broken=self.chance.random() < 0.3)
                self.releases[f"e{self.number}"] = elsewhere
            case 12:
                self.restart_daemon()
            case 13 if self.ended:
                run = self.chance.choice(list(self.ended))
                if self.ended.pop(run) != "finished" and run not in self.releases and len(self.runs) < 3:
                    self.runs = {run: RunView(run, "queued", "sft")} | self.runs
                    self.failures.pop(run, None)

    # What is done

    def perform(self, action: do.Action) -> None:
        """Do it, or let it fail. What may never be done is an AssertionError."""
        unrecorded = do.Route | do.Hold | do.RouteCanary | do.ProbeRun | do.LoadAdapter | do.Replay
        if not isinstance(action, unrecorded) and self.goes_wrong(0.05):
            raise Unwritable
        getattr(self, f"_{type(action).__name__}")(action)

    def _StartWorker(self, action: do.StartWorker) -> None:
        run = self.runs[action.run]
        assert not any(worker.view.alive for worker in self.workers.values()), "one worker at a time"
        assert action.run not in self.workers
        assert self.now - self.unwritten >= WRITE_REST_SECONDS, "it could not be recorded"
        assert run.losses < MOST_LOSSES, "a stage is not lost for ever"
        if self.exclusive:
            beside = [engine for engine in self.engines.values() if engine.process]
            assert all(one.view.life == "sleeping" for one in beside), "no worker beside an engine that is awake"
            assert not beside or run.losses == 0, "a stage that was lost gets all of the memory"
        live = self.live()
        assert not (run.stage == "verify" and live and self.releases[live].unread), "compared with what nobody has read"
        leaves = "done"
        if self.faults:
            leaves = self.chance.choice(["done"] * 8 + ["nothing", "failed", "short of memory", "damaged"])
        leaves = "nothing" if self.doomed.get(action.run) == "worker" else leaves
        worker = Worker(WorkerView(action.run, alive=True), self.now + self.chance.choice([1, 3, 8]), leaves)
        if self.goes_wrong(0.2):
            worker.stubborn_until = self.now + 20
        self.workers[action.run] = worker
        self.runs[action.run] = replace(run, state="running")

    def _StopWorker(self, action: do.StopWorker) -> None:
        worker, run = self.workers[action.run], self.runs.get(action.run)
        assert worker.view.alive
        assert not worker.view.told_to_stop, "it is asked once"
        assert run is None or run.state == "stopping", "nobody wants it to stop"
        worker.view, worker.told_at = replace(worker.view, told_to_stop=True), self.now

    def _KillWorker(self, action: do.KillWorker) -> None:
        worker = self.workers[action.run]
        assert self.now - worker.told_at > 5, "it had no time to end"
        assert self.now - worker.killed_at >= 5, "it is killed again and again"
        worker.killed_at = self.now

    def _EndStage(self, action: do.EndStage) -> None:
        assert self.workers[action.run].view.alive
        self.runs[action.run] = replace(self.runs[action.run], ending=True)

    def _WarnOfSilence(self, action: do.WarnOfSilence) -> None: ...

    def _ForgetWorker(self, action: do.ForgetWorker) -> None:
        worker = self.workers.pop(action.run)
        assert not worker.view.alive, "its process is forgotten"
        if action.lost:
            assert not worker.view.told_to_stop, "what stops as asked is not lost"
            run = self.runs[action.run]
            self.runs[action.run] = replace(run, losses=run.losses + 1)

    def _Advance(self, action: do.Advance) -> None:
        run = self.runs[action.run]
        assert run.outcome == "done"
        wish = "" if run.wish == "keep" else run.wish
        following = STAGES[STAGES.index(run.stage) + 1]
        self.runs[run.id] = replace(run, stage=following, outcome="none", losses=0, ending=False, wish=wish)

    def _RetryStage(self, action: do.RetryStage) -> None:
        run = self.runs[action.run]
        assert run.losses == 0, "it is tried again once"
        self.runs[run.id] = replace(run, outcome="none", short_of_memory=False, losses=run.losses + 1)

    def _end(self, run: str, state: str) -> None:
        assert run not in self.workers, "its process is left alone"
        del self.runs[run]
        self.failures.pop(run, None)
        self.ended[run] = state

    def _FailRun(self, action: do.FailRun) -> None:
        run = self.runs[action.run]
        assert run.state != "stopping", "it was asked to stop"
        if action.why == "engine":
            assert self.failures[action.run].count >= 3
        self._end(action.run, "failed")

    def _StopRun(self, action: do.StopRun) -> None:
        run = self.runs[action.run]
        assert run.state == "stopping"
        assert action.discard == (run.wish == "discard")
        self._end(action.run, "stopped")

    def _ProbeRun(self, action: do.ProbeRun) -> None:
        run, engine = self.runs[action.run], self.engines[action.run]
        assert engine.view.life == "ready"
        assert run.probe is None, "it is asked once"
        self.runs[run.id] = replace(run, probe=ProbeView("asking"))
        view = ProbeView("answered", "odd" if not engine.view.fresh and self.chance.random() < 0.3 else "")
        if self.goes_wrong(0.3):
            view = self.chance.choice(
                [ProbeView("unanswered", "500"), ProbeView("refused", "no"), replace(view, wrong="x")]
            )
        self.answering.append((self.now + 1, lambda: self._probed(run.id, engine, view)))

    def _probed(self, run: str, engine: Engine, view: ProbeView) -> None:
        found = self.runs.get(run)
        if found and found.probe and self.engines.get(run) is engine:
            self.runs[run] = replace(found, probe=view)

    def _forget_probe(self, release: str) -> None:
        if release in self.runs:
            self.runs[release] = replace(self.runs[release], probe=None)

    def _Conclude(self, action: do.Conclude) -> None:
        run, engine = self.runs[action.run], self.engines.get(action.run)
        if not run.refused:
            assert run.probe, "nobody was asked"
            assert run.probe.state == "answered"
            assert not (run.probe.wrong and engine and not engine.view.fresh), "for what other weights have spoilt"
        good = not run.refused and not (run.probe and run.probe.wrong)
        self._end(run.id, "finished")
        if good:
            self.releases[run.id] = Release(broken=self.goes_wrong(0.15))
            if self.promotes[run.id] and self.live() != run.id:
                self.deployments.append(Deployment(run.id))

    def _StartEngine(self, action: do.StartEngine) -> None:
        release = self.releases.get(action.release)
        assert action.release not in self.engines, "it has one"
        assert self.now - self.unwritten >= WRITE_REST_SECONDS, "it could not be recorded"
        if release:
            assert not release.unread, "nobody has read its files"
            assert self.fit(action.release), "it may not be served"
        if failure := self.failures.get(action.release):
            rest = min(2.0 ** (failure.count - 1), LONGEST_REST_SECONDS)
            assert self.now - failure.at >= rest, "it does not rest"
        if self.exclusive:
            assert not self.engines, "one engine at a time"
            assert not any(worker.view.alive for worker in self.workers.values()), "no engine beside a worker"
        engine = Engine(EngineView(action.release, "starting"), ready_at=self.now + self.chance.choice([1, 4]))
        self.engines[action.release] = engine
        broken = release.broken if release else self.doomed.get(action.release) == "engine"
        if broken or self.goes_wrong(0.1):
            engine.process = self.chance.random() < 0.5
            self._fail(engine, "could not be started")

    def _unrouted(self, release: str) -> None:
        assert release != self.routed, "requests are sent to it"
        assert not self.routed_canary or release != self.routed_canary[0], "requests are sent to it"

    def _idle(self, engine: Engine) -> None:
        assert engine.view.life not in ("draining", "swapping", "waking"), "something is done with it already"

    def _StopEngine(self, action: do.StopEngine) -> None:
        engine = self.engines[action.release]
        self._unrouted(action.release)
        self._idle(engine)
        if action.failure is None:
            self.failures.pop(action.release, None)
        else:
            self.failures[action.release] = action.failure
        self._forget_probe(action.release)
        self._become(engine, life="draining")
        engine.until = self.now + 1

        def gone() -> None:
            if self.goes_wrong(0.2):
                self._fail(engine, "does not end")
            else:
                del self.engines[action.release]

        engine.then = gone

    def _SleepEngine(self, action: do.SleepEngine) -> None:
        engine = self.engines[action.release]
        self._unrouted(action.release)
        assert self.exclusive
        assert self.sleeps
        assert engine.view.life == "ready"
        self._become(engine, life="draining", adapter=None, fresh=False)
        engine.until, engine.ready_since = self.now + 2, None
        engine.then = lambda: (
            self._fail(engine, "does not sleep") if self.goes_wrong(0.3) else self._become(engine, life="sleeping")
        )

    def _SwapEngine(self, action: do.SwapEngine) -> None:
        engine = self.engines.pop(action.old)
        self._unrouted(action.old)
        self._idle(engine)
        back = engine.view.life == "failed"
        assert not back or engine.view.before == action.new, "nobody knows what it serves"
        assert back or engine.view.life in ("ready", "sleeping")
        assert action.new not in self.engines
        assert not (action.new in self.releases and self.releases[action.new].unread), "nobody has read its files"
        assert not any(one.view.alive for one in self.workers.values()) or not self.exclusive
        wakes = engine.view.life == "sleeping"
        engine.view = EngineView(action.new, "waking" if wakes else "swapping", fresh=False)
        engine.until, engine.ready_since = self.now + 2, None
        self.engines[action.new] = engine
        self._forget_probe(action.old)

        def loaded() -> None:
            if self.goes_wrong(0.4):
                self.unswappable.add(action.new)
                self._fail(engine, "does not load")
                self._become(engine, before="" if self.chance.random() < 0.3 else action.old)
            else:
                self._become(engine, life="ready")
                engine.ready_since = self.now

        engine.then = loaded

    def _LoadAdapter(self, action: do.LoadAdapter) -> None:
        engine = self.engines[action.release]
        assert engine.view.life == "ready"
        assert engine.view.adapter is None or engine.view.adapter.run != action.run, "it is given once"
        self._become(engine, adapter=AdapterView(action.run, "loading"))
        view = AdapterView(action.run, "refused", "no") if self.goes_wrong(0.3) else AdapterView(action.run, "loaded")

        def given() -> None:
            if engine.view.life == "ready" and engine.view.adapter == AdapterView(action.run, "loading"):
                self._become(engine, adapter=view)

        self.answering.append((self.now + 1, given))

    def _EndUnmerged(self, action: do.EndUnmerged) -> None:
        assert self.unmerged
        self.unmerged = None
        for engine in self.engines.values():
            if engine.view.adapter and engine.view.adapter.state == "refused":
                self._become(engine, adapter=None)

    def _FallBack(self, action: do.FallBack) -> None:
        *_, before, failing = self._counting()
        if failing.release != action.release:
            return
        assert not failing.answered, "it has answered"
        assert action.to == before.release
        failing.counts = False
        self.failures.pop(failing.release, None)

    def _CheckRelease(self, action: do.CheckRelease) -> None:
        assert action.release not in self.checking, "it is being read"
        self.checking[action.release] = self.now + 1

    def _Replay(self, action: do.Replay) -> None:
        engine = self.engines[action.release]
        assert engine.view.life == "ready"
        before = engine.view.replay
        assert before is None or before.state == "unanswered"
        tries = before.tries + 1 if before else 1
        self._become(engine, replay=ReplayView("asking", tries))
        state: Any = "unanswered" if self.goes_wrong(0.4) else "answered"

        def said() -> None:
            if engine.view.life == "ready":
                self._become(engine, replay=ReplayView(state, tries, self.now))

        self.answering.append((self.now + 1, said))

    def _ConcludeReplay(self, action: do.ConcludeReplay) -> None:
        replay = self.engines[action.release].view.replay
        assert replay
        assert replay.state == "answered"
        release = self.releases[action.release]
        release.unproven, release.refused = False, self.goes_wrong(0.3)

    def _RecordAnswer(self, action: do.RecordAnswer) -> None:
        assert self.routed == action.release
        if action.release == self.live():
            self._counting()[-1].answered = True

    def _GiveWay(self, action: do.GiveWay) -> None:
        live = action.release
        assert not self.fit(live)
        if live != self.live():
            return
        for one in self.deployments:
            one.counts = one.counts and one.release != live
        if action.to is not None and self.live() != action.to:
            self.deployments.append(Deployment(action.to))
        self.failures.pop(live, None)

    def _may_answer(self, release: str, already: bool) -> None:
        assert self.engines[release].view.life == "ready", "nobody would answer"
        if release in self.releases and not already:
            assert not self.releases[release].unread, "nobody has read its files"
            assert not self.releases[release].unproven, "it has not repeated what it said elsewhere"

    def _Route(self, action: do.Route) -> None:
        if action.release is not None:
            self._may_answer(action.release, already=action.release == self.routed)
            assert self.fit(action.release), "it may not be served"
        if action.adapter:
            assert self.engines[str(action.release)].view.adapter == AdapterView(action.adapter, "loaded")
        self.routed, self.routed_adapter = action.release, action.adapter

    def _RouteCanary(self, action: do.RouteCanary) -> None:
        if action.release is not None:
            already = bool(self.routed_canary and self.routed_canary[0] == action.release)
            self._may_answer(action.release, already or action.release == self.routed)
        self.routed_canary = (action.release, action.share) if action.release else None

    def _EndCanary(self, action: do.EndCanary) -> None:
        assert self.canary
        if action.outcome == "promoted" and self.live() != self.canary.release:
            assert self.engines[self.canary.release].view.life == "ready"
            self.deployments.append(Deployment(self.canary.release))
        self.canary = None

    def _Hold(self, action: do.Hold) -> None:
        assert action.on != self.holding
        assert not (action.on and self.live() is None), "nobody will come"
        self.holding = action.on


def _always(world: World) -> None:
    """What holds after each round of actions that all worked."""
    for routed in (world.routed, world.routed_canary and world.routed_canary[0]):
        assert routed is None or world.engines[routed].view.life == "ready", "requests are sent to nobody"
    assert not (world.holding and world.routed), "requests wait although somebody answers"
    if world.unmerged and (engine := world.engines.get(world.unmerged.live)):
        refused = engine.view.adapter and engine.view.adapter.state == "refused"
        assert not (refused and engine.view.life == "ready"), "an adapter that was refused is still to answer"
    if world.exclusive:
        running = [one for one in world.engines.values() if one.process and one.view.life != "failed"]
        assert len(running) <= 1, "two engines under the exclusive lease"


def _in_the_end(world: World) -> None:
    """What holds at rest."""
    live = world.live()
    assert not world.runs, f"a run never ends: {world.runs}"
    assert not world.workers
    assert world.routed == live, f"{live} is live, and {world.routed} answers"
    assert not world.holding
    assert live is None or world._counting()[-1].answered, "that it answers is not on record"
    canary = world.canary.release if world.canary else None
    assert canary == (world.routed_canary and world.routed_canary[0]), "the canary gets nothing"
    assert set(world.engines) == {one for one in (live, canary) if one}, "an engine that nobody wants"
    assert not world.unmerged, "its run has ended"


def _round(world: World, decide: Decide) -> bool:
    """One look, decision and round of actions; whether there was something to do."""
    decided, worked = decide(world.snapshot()), True
    for action in decided:
        if not worked and isinstance(action, do.Start):
            continue
        try:
            world.perform(action)
        except Unwritable:
            world.unwritten, worked = world.now, False
    if worked and not any(isinstance(action, do.FallBack | do.GiveWay) for action in decided):
        _always(world)
    return bool(decided)


def live_through(decide: Decide, seed: int) -> None:
    """One random history. Raises AssertionError where something does not hold, whatever `decide` raises elsewhere."""
    chance = random.Random(seed)
    exclusive = chance.random() < 0.6
    world = World(
        chance,
        exclusive,
        sleeps=exclusive and chance.random() < 0.6,
        measures=seed % 2 == 0,
        swaps=chance.random() < 0.6,
        roomy=chance.random() < 0.8,
    )
    world.releases["r0"] = Release()
    world.deployments.append(Deployment("r0", answered=True))
    for _ in range(FAULTY_TICKS):
        if chance.random() < 0.15:
            world.interfere()
        _round(world, decide)
        if chance.random() < 0.5:
            world.pass_time()
    world.faults = False
    busy = 0
    for _ in range(QUIET_TICKS):
        acted = _round(world, decide)
        busy = busy + 1 if acted else 0
        assert busy < 50, "there is always something to do"
        if not acted and not _under_way(world):
            break
        world.pass_time()
    else:
        hopeless = world.live() and world.releases[str(world.live())].broken and not world.snapshot().fallback
        assert hopeless, "it never comes to rest"
        return
    _in_the_end(world)


def _under_way(world: World) -> bool:
    """Whether something will happen by itself."""
    lives = {engine.view.life for engine in world.engines.values()}
    waits = lives & {"starting", "draining", "swapping", "waking"} or world.answering or world.checking
    working = any(worker.view.alive for worker in world.workers.values())
    resting = world.now - world.unwritten < WRITE_REST_SECONDS or any(
        world.now - one.at < LONGEST_REST_SECONDS for one in world.failures.values()
    )
    silent = any(one.view.replay and one.view.replay.state == "unanswered" for one in world.engines.values())
    return bool(waits or working or resting or silent)
