"""What to do next, as a pure function of what is. See `decide`."""

from __future__ import annotations

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
from appliance.supervisor.snapshot import (
    CanaryView,
    EngineView,
    Failure,
    RunView,
    Snapshot,
    UnmergedView,
    WorkerView,
)

MOST_LOSSES = 5
"""A stage whose process dies this often without a result is given up."""
MOST_CANDIDATE_FAILURES = 3
"""A release whose engine fails this often while it is probed, or is the canary, is given up."""
LONGEST_REST_SECONDS = 60.0
"""An engine that keeps failing is started ever more rarely, and at last after so long; one that had served for longer
starts afresh."""
MOST_REPLAY_TRIES = 3
"""An engine that has so often not answered when it was asked for reference answers has failed."""
REPLAY_REST_SECONDS = 1.0
WRITE_REST_SECONDS = 5.0
"""After the database has not taken a record, no process is started for so long."""


def decide(snapshot: Snapshot) -> list[Action]:
    """The actions that this moment calls for. Doing them and asking again converges.

    Runs go one at a time. An engine is wanted for the live release, the canary and a release that is being probed.
    Under an exclusive lease nothing else runs beside a worker but an engine that sleeps, and one engine at a time. None
    is started on a release, and nobody is sent to it, before its files have been found whole. Nothing is started while
    it could not be recorded.
    """
    head = snapshot.head
    actions: list[Action] = []
    for worker in snapshot.workers:
        if all(worker.run != run.id for run in snapshot.runs if run == head or run.state == "stopping"):
            if not worker.alive:
                actions.append(ForgetWorker(worker.run, lost=False))
            elif ending := _ending(worker):
                actions.append(ending)
    for run in snapshot.runs:
        if (run == head or run.state == "stopping") and (action := _run_action(run, snapshot)):
            actions.append(action)
    unread = snapshot.unread - snapshot.checking - snapshot.unfit.keys()
    actions += [CheckRelease(release) for release in sorted(unread)]
    actions += _replay_actions(snapshot)
    wanted = _wanted_engines(head, snapshot)
    actions += _canary_actions(wanted, snapshot) + _adapter_actions(snapshot) + _engine_actions(head, wanted, snapshot)
    if snapshot.now - snapshot.unwritten < WRITE_REST_SECONDS:
        return [action for action in actions if not isinstance(action, Start)]
    return actions


def _run_action(run: RunView, snapshot: Snapshot) -> Action | None:
    worker = next((worker for worker in snapshot.workers if worker.run == run.id), None)
    if worker is not None and worker.alive:
        if run.state == "stopping":
            return _ending(worker)
        if run.wish == "keep" and not run.ending:
            return EndStage(run.id)
        return WarnOfSilence(run.id) if worker.silent else None
    if worker is not None:
        return ForgetWorker(run.id, lost=run.outcome == "none" and worker.begun and not worker.told_to_stop)
    if run.outcome == "unknown":
        return None
    if run.outcome == "done":
        return Conclude(run.id) if run.needs_engine else Advance(run.id)
    if run.state == "stopping":
        return StopRun(run.id, discard=run.wish == "discard")
    if run.outcome == "damaged":
        return FailRun(run.id, "damaged", run.fault)
    if run.outcome == "failed":
        return RetryStage(run.id) if run.short_of_memory and snapshot.sleeper else FailRun(run.id, "stage")
    if run.losses >= MOST_LOSSES:
        return FailRun(run.id, "losses")
    if run.needs_engine:
        return _probe_action(run, snapshot)
    if snapshot.training:
        return None
    beside = snapshot.sleeper if _has_room_beside(run) else None
    if snapshot.exclusive and any(engine != beside for engine in snapshot.engines):
        return None
    if snapshot.measures and any(engine.life == "starting" for engine in snapshot.engines):
        return None
    if run.stage == "verify" and snapshot.live in snapshot.unread | snapshot.unfit.keys():
        return None
    return StartWorker(run.id)


def _ending(worker: WorkerView) -> Action | None:
    """How to get a living worker to end: ask once, and where that does not help, kill it."""
    if not worker.told_to_stop:
        return StopWorker(worker.run)
    return KillWorker(worker.run) if worker.overdue and not worker.killed else None


def _probe_action(run: RunView, snapshot: Snapshot) -> Action | None:
    """An engine that does not answer its probes has failed, and the next one is asked.

    One that has served other weights refuses no release: then one of its own is asked.
    """
    if run.refused:
        return Conclude(run.id)
    if _given_up(run.id, snapshot):
        failure = snapshot.failures[run.id]
        return FailRun(run.id, "engine", f"its engine failed {failure.count} times; the last time it {failure.reason}")
    engine = snapshot.engine(run.id)
    if run.probe is None:
        return ProbeRun(run.id) if engine and engine.life == "ready" else None
    match run.probe.state:
        case "answered" | "refused" if run.probe.wrong and engine and not engine.fresh:
            return StopEngine(run.id) if engine.life == "ready" else None
        case "answered":
            return Conclude(run.id)
        case "refused":
            return FailRun(run.id, "probe", run.probe.wrong)
        case "unanswered" if engine and engine.life == "ready":
            return StopEngine(run.id, _failed_again(run.id, run.probe.wrong, snapshot))
        case _:
            return None


def _given_up(release: str, snapshot: Snapshot) -> bool:
    failure = snapshot.failures.get(release)
    return failure is not None and failure.count >= MOST_CANDIDATE_FAILURES


def _replay_actions(snapshot: Snapshot) -> list[Action]:
    actions: list[Action] = []
    for release in sorted((snapshot.unproven & snapshot.ready) - snapshot.unread - snapshot.unfit.keys()):
        engine = snapshot.engine(release)
        replay = engine.replay if engine else None
        if engine is None or replay is None:
            actions.append(Replay(release))
        elif replay.state == "answered":
            actions.append(ConcludeReplay(release))
        elif replay.state == "unanswered" and replay.tries >= MOST_REPLAY_TRIES:
            silent = "did not answer when it was asked for reference answers"
            actions.append(StopEngine(release, _failed_again(release, silent, snapshot)))
        elif replay.state == "unanswered" and snapshot.now - replay.at >= REPLAY_REST_SECONDS:
            actions.append(Replay(release))
    return actions


def _failed_again(release: str, reason: str, snapshot: Snapshot) -> Failure:
    """A failure of its engine beside those before it."""
    before = snapshot.failures.get(release)
    return Failure(before.count + 1 if before else 1, snapshot.now, reason)


def _held_against(engine: EngineView, snapshot: Snapshot) -> Failure | None:
    """What the failure of an engine says of its release: nothing, where it was not answering or about to."""
    if engine.life != "failed" or engine.was not in ("starting", "ready"):
        return None
    if engine.served > LONGEST_REST_SECONDS:
        return Failure(1, snapshot.now, engine.reason)
    return _failed_again(engine.release, engine.reason, snapshot)


def rests(failure: Failure | None, now: float) -> bool:
    """Whether an engine has failed a moment ago and is not started again yet."""
    return failure is not None and now - failure.at < min(2.0 ** (failure.count - 1), LONGEST_REST_SECONDS)


def _canary_actions(wanted: list[str], snapshot: Snapshot) -> list[Action]:
    canary = snapshot.canary
    if canary is not None and (ending := _canary_ending(canary, snapshot)):
        return [ending]
    answers = canary is not None and canary.release in wanted and _may_answer(canary.release, snapshot)
    routed = (canary.release, canary.share) if canary is not None and answers else None
    if routed == snapshot.routed_canary:
        return []
    return [RouteCanary(*routed) if routed else RouteCanary(None)]


def _canary_ending(canary: CanaryView, snapshot: Snapshot) -> EndCanary | None:
    """How the canary ends, if it does: by what happened around it, else by its figures."""
    if snapshot.live == canary.release:
        return EndCanary("promoted", "by hand")
    if snapshot.live != canary.live:
        return EndCanary("rolled back", f"{snapshot.live} went live meanwhile")
    if reason := snapshot.unfit.get(canary.release):
        return EndCanary("rolled back", reason)
    if snapshot.exclusive or (not snapshot.room and canary.release in _missing([canary.release], snapshot)):
        return EndCanary("rolled back", "the lease or the memory leaves no room for its engine")
    if _given_up(canary.release, snapshot):
        failure = snapshot.failures[canary.release]
        reason = f"its engine failed {failure.count} times; the last time it {failure.reason}"
        return EndCanary("rolled back", reason)
    match canary.verdict.outcome:
        case "promote" if canary.release in snapshot.ready:
            return EndCanary("promoted", canary.verdict.reason)
        case "rollback":
            return EndCanary("rolled back", canary.verdict.reason)
        case _:
            return None


def _adapter_actions(snapshot: Snapshot) -> list[Action]:
    unmerged = snapshot.unmerged
    if unmerged is None:
        return []
    if reason := _adapter_ending(unmerged, snapshot):
        return [EndUnmerged(reason)]
    engine = snapshot.engine(unmerged.live)
    if engine is None or engine.life != "ready":
        return []
    if engine.adapter is None or engine.adapter.run != unmerged.run:
        return [LoadAdapter(unmerged.live, unmerged.run)]
    return [EndUnmerged(engine.adapter.reason)] if engine.adapter.state == "refused" else []


def _adapter_ending(unmerged: UnmergedView, snapshot: Snapshot) -> str:
    """Why the adapter answers no longer: its release does, another was promoted, or there will be none."""
    if snapshot.live == unmerged.run:
        return "its release answers" if snapshot.routed == unmerged.run else ""
    if snapshot.live != unmerged.live:
        return f"{snapshot.live} went live"
    active = any(run.id == unmerged.run for run in snapshot.runs)
    return "" if active else f"{unmerged.run} ended, and its release did not go live"


def _routed_adapter(routed: str | None, snapshot: Snapshot) -> str | None:
    """The adapter with which the routed engine answers."""
    unmerged = snapshot.unmerged
    if unmerged is None or routed != unmerged.live:
        return None
    engine = snapshot.engine(routed)
    adapter = engine.adapter if engine else None
    return unmerged.run if adapter and (adapter.run, adapter.state) == (unmerged.run, "loaded") else None


def _engine_actions(head: RunView | None, wanted: list[str], snapshot: Snapshot) -> list[Action]:
    if snapshot.live is not None and (reason := snapshot.unfit.get(snapshot.live)):
        return [GiveWay(snapshot.live, snapshot.successor, reason)]
    if snapshot.live and snapshot.fallback and (reason := _does_not_come_up(snapshot)):
        return [FallBack(snapshot.live, snapshot.fallback, reason)]
    swap = _swap(wanted, snapshot) or _wake(wanted, snapshot)
    routed = None if swap else _routed(wanted, snapshot)
    coming = routed is None and _on_its_way(wanted, snapshot)
    actions: list[Action] = [Hold(coming)] if coming != snapshot.holding else []
    adapter = _routed_adapter(routed, snapshot)
    if (routed, adapter) != (snapshot.routed, snapshot.routed_adapter):
        actions.append(Route(routed, adapter))
    elif routed is not None and routed == snapshot.live and not snapshot.answered:
        actions.append(RecordAnswer(routed))
    for engine in snapshot.engines:
        if swap and engine.release == swap.old:
            actions.append(swap)
        elif action := _unless_wanted(engine, wanted, routed, head, snapshot):
            actions.append(action)
    alone = snapshot.exclusive or not snapshot.room
    if not (swap or _swapping(snapshot) or (alone and snapshot.engines)):
        fit = (release for release in _missing(wanted, snapshot) if release not in snapshot.unfit)
        actions += [StartEngine(one) for one in fit if not rests(snapshot.failures.get(one), snapshot.now)]
    return actions


def _does_not_come_up(snapshot: Snapshot) -> str:
    """Why the live release, which has never answered, is not waited for any more; empty where it is."""
    engine, failure = snapshot.engine(snapshot.live), snapshot.failures.get(snapshot.live or "")
    if engine and engine.life == "failed" and engine.was == "swapping" and engine.before == snapshot.fallback:
        return f"its weights could not be loaded in place: {engine.reason}"
    if failure and snapshot.live not in snapshot.ready | snapshot.unread:
        return f"its engine does not start: it {failure.reason}"
    return ""


def _unless_wanted(
    engine: EngineView, wanted: list[str], routed: str | None, head: RunView | None, snapshot: Snapshot
) -> Action | None:
    """What is done with an engine that has failed, or of which nothing is wanted now."""
    match engine.life:
        case "draining" | "swapping" | "waking":
            return None
        case "failed":
            return StopEngine(engine.release, _held_against(engine, snapshot))
        case "sleeping":
            # Until something is wanted: a worker has the memory, or the live release's files are read.
            sleeps_on = snapshot.live and not wanted and _has_room_beside(head)
            return None if sleeps_on else StopEngine(engine.release)
    if engine.release in wanted or engine.release == routed:
        return None
    sleeps = _may_sleep(engine, head, snapshot)
    return SleepEngine(engine.release) if sleeps else StopEngine(engine.release)


def _wanted_engines(head: RunView | None, snapshot: Snapshot) -> list[str]:
    probed = head is not None and head.needs_engine and not head.refused and not _given_up(head.id, snapshot)
    candidate = head.id if head is not None and probed else None
    if snapshot.exclusive and _training(head, snapshot):
        return []
    canary = snapshot.canary.release if snapshot.canary and not snapshot.exclusive else None
    canary = None if canary and _waits(canary, snapshot) else canary
    wanted = list(dict.fromkeys(release for release in (_answering(snapshot), canary, candidate) if release))
    return [candidate or wanted[0]] if wanted and _makes_room(wanted, snapshot) else wanted


def _training(head: RunView | None, snapshot: Snapshot) -> bool:
    """Whether a worker runs or is to start."""
    return snapshot.training or (head is not None and not head.needs_engine)


def _may_sleep(engine: EngineView, head: RunView | None, snapshot: Snapshot) -> bool:
    """Whether the engine, which is not wanted now, sleeps instead of being stopped: alone, and while a worker runs."""
    alone = snapshot.exclusive and len(snapshot.engines) == 1 and engine.release in snapshot.ready
    return snapshot.sleeps and alone and _training(head, snapshot) and _has_room_beside(head)


def _has_room_beside(run: RunView | None) -> bool:
    """Whether an engine may sleep beside its worker: one that was lost may have had too little memory."""
    return run is None or run.losses == 0


def _answering(snapshot: Snapshot) -> str | None:
    """The release whose engine is to answer: the live one, and until its files are read the one that does so now."""
    if snapshot.live is None or not _waits(snapshot.live, snapshot):
        return snapshot.live
    return None if snapshot.routed in snapshot.unfit else snapshot.routed


def _waits(release: str, snapshot: Snapshot) -> bool:
    """Whether its files have to be read before an engine may start on them."""
    return release in snapshot.unread and all(engine.release != release for engine in snapshot.awake)


def _may_answer(release: str, snapshot: Snapshot) -> bool:
    """Whether its engine is ready, on files that are whole, and has repeated what it said elsewhere.

    One that answers goes on while its files are read again.
    """
    answers = release in (snapshot.routed, snapshot.routed_canary and snapshot.routed_canary[0])
    return release in snapshot.ready and (answers or release not in snapshot.unread | snapshot.unproven)


def _makes_room(wanted: list[str], snapshot: Snapshot) -> bool:
    """Whether an engine has to leave before another can start."""
    return snapshot.exclusive or (not snapshot.room and bool(_missing(wanted, snapshot)))


def _missing(wanted: list[str], snapshot: Snapshot) -> list[str]:
    return [release for release in wanted if all(engine.release != release for engine in snapshot.awake)]


def _swapping(snapshot: Snapshot) -> bool:
    return any(engine.life in ("swapping", "waking") for engine in snapshot.engines)


def _swap(wanted: list[str], snapshot: Snapshot) -> SwapEngine | None:
    """The exchange of weights that saves the live release a start of its own, back to its own where others failed."""
    live = snapshot.live
    if live is None or live not in _missing(wanted, snapshot) or _swapping(snapshot):
        return None
    for engine in snapshot.engines:
        if engine.life == "failed" and engine.was == "swapping" and engine.before == live:
            return SwapEngine(engine.release, live)
    spare = sorted((snapshot.swappable & snapshot.ready) - set(wanted))
    return SwapEngine(spare[0], live) if spare else None


def _wake(wanted: list[str], snapshot: Snapshot) -> SwapEngine | None:
    """The engine that sleeps goes on with the weights of what is wanted, its own or others."""
    missing = _missing(wanted, snapshot)
    if snapshot.sleeper is None or _swapping(snapshot) or not missing or missing[0] not in snapshot.wakeable:
        return None
    return SwapEngine(snapshot.sleeper.release, missing[0])


def _routed(wanted: list[str], snapshot: Snapshot) -> str | None:
    """The live release once its engine is ready; until then, where it need not make room, the one that answers now."""
    live, routed = snapshot.live, snapshot.routed
    if live in wanted and live is not None and _may_answer(live, snapshot):
        return live
    keeps = routed in wanted or (live is not None and not _makes_room(wanted, snapshot))
    return routed if keeps and routed in snapshot.ready and routed not in snapshot.unfit else None


def _on_its_way(wanted: list[str], snapshot: Snapshot) -> bool:
    """Whether the live release's engine starts, or will as soon as there is room, and has not failed."""
    live = snapshot.live
    if live is None or live in snapshot.failures:
        return False
    if _waits(live, snapshot):
        return not (snapshot.exclusive and (snapshot.head or snapshot.training))
    engine = snapshot.engine(live)
    return live in wanted and not (engine and _held_against(engine, snapshot))
