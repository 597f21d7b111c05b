"""The decisions as a table: what is, and what has to be done."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.canary import Comparison, Tally
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
    StartEngine,
    StartWorker,
    StopEngine,
    StopRun,
    StopWorker,
    SwapEngine,
    WarnOfSilence,
)
from appliance.supervisor.decide import (
    LONGEST_REST_SECONDS,
    MOST_CANDIDATE_FAILURES,
    MOST_LOSSES,
    MOST_REPLAY_TRIES,
    REPLAY_REST_SECONDS,
    WRITE_REST_SECONDS,
    decide,
)
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

SFT = RunView("r1", "running", "sft")
PROBE = RunView("r1", "running", "probe")
ASKING = replace(PROBE, probe=ProbeView("asking"))
A = EngineView("a", "ready")
R1 = EngineView("r1", "ready")
B = EngineView("b", "ready")
DEAD = EngineView("a", "failed", "has died")
DIED = Failure(1, 0.0, "has died")
FAILED_OFTEN = Failure(MOST_CANDIDATE_FAILURES, 0.0, "has died")
GOOD = CanaryView("b", "a", 0.1, Comparison("a", "b", Tally(requests=100), Tally(requests=100)))
BAD = CanaryView("b", "a", 0.1, Comparison("a", "b", Tally(requests=100), Tally(requests=100, errors=100)))
WAITING = CanaryView("b", "a", 0.1, Comparison("a", "b"))
MERGE = RunView("r1", "running", "merge")
MERGING = WorkerView("r1", alive=True)
UNMERGED = UnmergedView("r1", "a")
ADAPTED = replace(A, adapter=AdapterView("r1", "loaded"))
SWAPPING = EngineView("b", "swapping")
ASLEEP = EngineView("a", "sleeping")
NOT_LOADED = EngineView("b", "failed", "no such weights", was="swapping", before="a")
UNANSWERED = ReplayView("unanswered", tries=1, at=0.0)
TRAINING = WorkerView("r1", alive=True)

TABLE: dict[str, tuple[Snapshot, list[Action]]] = {
    "nothing to do": (Snapshot(), []),
    "a queued run starts": (Snapshot(runs=(RunView("r1", "queued", "sft"),)), [StartWorker("r1")]),
    "runs go one at a time": (
        Snapshot(runs=(SFT, RunView("r2", "queued", "sft")), workers=(WorkerView("r1", alive=True),)),
        [],
    ),
    "a run that has begun goes before an older one in the queue": (
        Snapshot(runs=(RunView("old", "queued", "sft"), SFT)),
        [StartWorker("r1")],
    ),
    "a worker that is done leaves the record before the run advances": (
        Snapshot(runs=(RunView("r1", "running", "sft", "done"),), workers=(WorkerView("r1", alive=False),)),
        [ForgetWorker("r1", lost=False)],
    ),
    "a finished stage leads to the next": (Snapshot(runs=(RunView("r1", "running", "sft", "done"),)), [Advance("r1")]),
    "a worker that died without a result is lost": (
        Snapshot(runs=(SFT,), workers=(WorkerView("r1", alive=False),)),
        [ForgetWorker("r1", lost=True)],
    ),
    "a lost stage starts again": (Snapshot(runs=(RunView("r1", "running", "sft", losses=1),)), [StartWorker("r1")]),
    "a stage lost too often fails": (
        Snapshot(runs=(RunView("r1", "running", "sft", losses=MOST_LOSSES),)),
        [FailRun("r1", "losses")],
    ),
    "a stage that says it cannot go on fails": (
        Snapshot(runs=(RunView("r1", "running", "sft", "failed"),)),
        [FailRun("r1", "stage")],
    ),
    "a run is asked to stop": (
        Snapshot(runs=(RunView("r1", "stopping", "sft"),), workers=(WorkerView("r1", alive=True),)),
        [StopWorker("r1")],
    ),
    "and asked once": (
        Snapshot(runs=(RunView("r1", "stopping", "sft"),), workers=(WorkerView("r1", alive=True, told_to_stop=True),)),
        [],
    ),
    "and killed where it does not obey": (
        Snapshot(
            runs=(RunView("r1", "stopping", "sft"),),
            workers=(WorkerView("r1", alive=True, told_to_stop=True, overdue=True),),
        ),
        [KillWorker("r1")],
    ),
    "a worker that is silent for long is warned of": (
        Snapshot(runs=(SFT,), workers=(WorkerView("r1", alive=True, silent=True),)),
        [WarnOfSilence("r1")],
    ),
    "a worker of no active run that does not end is killed": (
        Snapshot(workers=(WorkerView("gone", alive=True, told_to_stop=True, overdue=True),)),
        [KillWorker("gone")],
    ),
    "a worker that stopped as asked is not lost": (
        Snapshot(runs=(RunView("r1", "stopping", "sft"),), workers=(WorkerView("r1", alive=False, told_to_stop=True),)),
        [ForgetWorker("r1", lost=False)],
    ),
    "a stopped run ends": (Snapshot(runs=(RunView("r1", "stopping", "sft"),)), [StopRun("r1")]),
    "a stage that ended while being stopped still counts": (
        Snapshot(runs=(RunView("r1", "stopping", "sft", "done"),)),
        [Advance("r1")],
    ),
    "a worker of no active run is told to end": (
        Snapshot(workers=(WorkerView("gone", alive=True),)),
        [StopWorker("gone")],
    ),
    "nothing starts beside another run's worker": (
        Snapshot(runs=(SFT,), workers=(WorkerView("gone", alive=True, told_to_stop=True),)),
        [],
    ),
    "the live release gets an engine, and requests wait for it": (Snapshot(live="a"), [Hold(True), StartEngine("a")]),
    "they wait while it starts": (Snapshot(live="a", engines=(EngineView("a", "starting"),), holding=True), []),
    "and it answers when it is ready": (
        Snapshot(live="a", engines=(A,), holding=True),
        [Hold(False), Route("a")],
    ),
    "an engine that fails to start keeps nobody waiting": (
        Snapshot(live="a", engines=(DEAD,), holding=True),
        [Hold(False), StopEngine("a", DIED)],
    ),
    "nor does one that takes too long": (
        Snapshot(live="a", engines=(EngineView("a", "failed", "takes too long"),), holding=True),
        [Hold(False), StopEngine("a", Failure(1, 0.0, "takes too long"))],
    ),
    "nor one that is started again after it failed": (
        Snapshot(live="a", failures={"a": Failure(1)}),
        [StartEngine("a")],
    ),
    "and goes on answering": (Snapshot(live="a", engines=(A,), routed="a"), []),
    "a dead engine stops answering and is cleared away": (
        Snapshot(live="a", engines=(replace(DEAD, was="ready"),), routed="a"),
        [Route(None), StopEngine("a", DIED)],
    ),
    "a hung engine is restarted": (
        Snapshot(live="a", engines=(EngineView("a", "failed", "hangs", was="ready"),), routed="a"),
        [Route(None), StopEngine("a", Failure(1, 0.0, "hangs"))],
    ),
    "an engine that failed rests": (Snapshot(live="a", failures={"a": DIED}), []),
    "the old release answers until the new one is ready": (
        Snapshot(live="b", engines=(A, EngineView("b", "starting")), routed="a"),
        [],
    ),
    "then the new one takes over and the old engine stops": (
        Snapshot(live="b", engines=(A, EngineView("b", "ready")), routed="a"),
        [Route("b"), StopEngine("a")],
    ),
    "an engine that is being stopped is left alone": (
        Snapshot(live="b", engines=(EngineView("a", "draining"), B), routed="b"),
        [],
    ),
    "a candidate gets an engine beside the live one": (
        Snapshot(runs=(PROBE,), live="a", engines=(A,), routed="a"),
        [StartEngine("r1")],
    ),
    "a ready candidate is probed": (
        Snapshot(runs=(PROBE,), live="a", engines=(A, R1), routed="a"),
        [ProbeRun("r1")],
    ),
    "and probed once": (
        Snapshot(runs=(ASKING,), live="a", engines=(A, R1), routed="a"),
        [],
    ),
    "a candidate that verify refused needs no engine": (
        Snapshot(runs=(RunView("r1", "running", "probe", refused=True),)),
        [Conclude("r1")],
    ),
    "a release that is written is only recorded": (
        Snapshot(runs=(RunView("r1", "running", "probe", "done"),), engines=(R1,)),
        [Conclude("r1")],
    ),
    "a candidate whose engine does not start fails": (
        Snapshot(runs=(PROBE,), failures={"r1": FAILED_OFTEN}),
        [FailRun("r1", "engine", "its engine failed 3 times; the last time it has died")],
    ),
    "a candidate that went live is served by the engine that was probed": (
        Snapshot(live="r1", engines=(A, R1), routed="a"),
        [Route("r1"), StopEngine("a")],
    ),
    "a candidate that did not go live loses its engine": (
        Snapshot(live="a", engines=(A, R1), routed="a"),
        [StopEngine("r1")],
    ),
    "exclusive: engines leave before a worker starts": (
        Snapshot(runs=(SFT,), live="a", engines=(A,), routed="a", exclusive=True),
        [Route(None), StopEngine("a")],
    ),
    "exclusive: a dead engine may have left children that hold the memory": (
        Snapshot(
            runs=(SFT,),
            live="a",
            engines=(EngineView("a", "draining"),),
            exclusive=True,
        ),
        [],
    ),
    "exclusive: the worker starts when they are gone": (
        Snapshot(runs=(SFT,), live="a", exclusive=True),
        [StartWorker("r1")],
    ),
    "exclusive: no engine starts beside a worker": (
        Snapshot(runs=(SFT,), workers=(WorkerView("r1", alive=True),), live="a", exclusive=True),
        [],
    ),
    "exclusive: the candidate's engine is the only one": (
        Snapshot(runs=(PROBE,), live="a", exclusive=True),
        [StartEngine("r1")],
    ),
    "exclusive: another release's engine leaves first": (
        Snapshot(live="b", engines=(A,), routed="a", exclusive=True),
        [Hold(True), Route(None), StopEngine("a")],
    ),
    "exclusive: the live engine comes back after the run": (
        Snapshot(live="a", exclusive=True),
        [Hold(True), StartEngine("a")],
    ),
    "exclusive: one that can sleep does so for the worker": (
        Snapshot(runs=(SFT,), live="a", engines=(A,), routed="a", exclusive=True, sleeps=True),
        [Route(None), SleepEngine("a")],
    ),
    "which does not start before it is seen to": (
        Snapshot(runs=(SFT,), live="a", engines=(EngineView("a", "draining"),), exclusive=True, sleeps=True),
        [],
    ),
    "nor is anything done with it then where it is wanted again": (
        Snapshot(live="a", engines=(EngineView("a", "draining"),), exclusive=True, holding=True),
        [],
    ),
    "nor where its process has died, which falling asleep will notice": (
        Snapshot(runs=(SFT,), live="a", engines=(EngineView("a", "draining"),), exclusive=True),
        [],
    ),
    "the worker starts beside one that sleeps": (
        Snapshot(runs=(SFT,), live="a", engines=(ASLEEP,), exclusive=True, sleeps=True),
        [StartWorker("r1")],
    ),
    "and both go on": (
        Snapshot(
            runs=(SFT,), workers=(TRAINING,), live="a", engines=(ASLEEP,), wakeable=frozenset("a"), exclusive=True
        ),
        [],
    ),
    "one of which nobody knows how well it sleeps is stopped first": (
        Snapshot(
            runs=(SFT,),
            live="a",
            engines=(EngineView("a", "failed", "slept", was="sleeping"),),
            exclusive=True,
            sleeps=True,
        ),
        [StopEngine("a")],
    ),
    "one that dies asleep has not failed": (
        Snapshot(
            runs=(SFT,), live="a", engines=(EngineView("a", "failed", "has died", was="sleeping"),), exclusive=True
        ),
        [StopEngine("a")],
    ),
    "and the worker waits until all of it is gone": (
        Snapshot(runs=(SFT,), live="a", engines=(EngineView("a", "draining"),), exclusive=True),
        [],
    ),
    "an engine that is not ready cannot sleep": (
        Snapshot(runs=(SFT,), live="a", engines=(EngineView("a", "starting"),), exclusive=True, sleeps=True),
        [StopEngine("a")],
    ),
    "nor two of them": (
        Snapshot(runs=(SFT,), live="a", engines=(A, B), routed="a", exclusive=True, sleeps=True),
        [Route(None), StopEngine("a"), StopEngine("b")],
    ),
    "nor where no worker needs the memory": (
        Snapshot(live="b", engines=(A,), routed="a", exclusive=True, sleeps=True),
        [Hold(True), Route(None), StopEngine("a")],
    ),
    "share: nothing has to sleep": (
        Snapshot(runs=(SFT,), live="b", engines=(A, B), routed="b", sleeps=True),
        [StartWorker("r1"), StopEngine("a")],
    ),
    "a stage that has lost a worker gets all of the memory": (
        Snapshot(
            runs=(RunView("r1", "running", "sft", losses=1),),
            live="a",
            engines=(ASLEEP,),
            exclusive=True,
            sleeps=True,
        ),
        [StopEngine("a")],
    ),
    "also where the engine is still awake": (
        Snapshot(
            runs=(RunView("r1", "running", "sft", losses=1),),
            live="a",
            engines=(A,),
            routed="a",
            exclusive=True,
            sleeps=True,
        ),
        [Route(None), StopEngine("a")],
    ),
    "a stage that runs out of memory beside one that sleeps is tried again": (
        Snapshot(
            runs=(RunView("r1", "running", "sft", "failed", short_of_memory=True),),
            live="a",
            engines=(ASLEEP,),
            exclusive=True,
        ),
        [RetryStage("r1")],
    ),
    "one that does so alone fails": (
        Snapshot(
            runs=(RunView("r1", "running", "sft", "failed", losses=1, short_of_memory=True),),
            live="a",
            exclusive=True,
        ),
        [FailRun("r1", "stage")],
    ),
    "and one that fails otherwise fails beside it too": (
        Snapshot(runs=(RunView("r1", "running", "sft", "failed"),), live="a", engines=(ASLEEP,), exclusive=True),
        [FailRun("r1", "stage")],
    ),
    "after the run it wakes, and requests wait for it": (
        Snapshot(live="a", engines=(ASLEEP,), wakeable=frozenset("a"), exclusive=True),
        [Hold(True), SwapEngine("a", "a")],
    ),
    "as another release where that has gone live": (
        Snapshot(live="b", engines=(ASLEEP,), wakeable=frozenset("ab"), exclusive=True),
        [Hold(True), SwapEngine("a", "b")],
    ),
    "or as the candidate": (
        Snapshot(runs=(PROBE,), live="a", engines=(ASLEEP,), wakeable=frozenset({"a", "r1"}), exclusive=True),
        [SwapEngine("a", "r1")],
    ),
    "one that cannot go on with those weights is stopped": (
        Snapshot(runs=(PROBE,), live="a", engines=(ASLEEP,), wakeable=frozenset("a"), exclusive=True),
        [StopEngine("a")],
    ),
    "as is one that nothing will be wanted of": (
        Snapshot(engines=(ASLEEP,), wakeable=frozenset("a"), exclusive=True),
        [StopEngine("a")],
    ),
    "it sleeps on while the files are read with which it is to wake": (
        Snapshot(
            live="a",
            unread=frozenset("a"),
            checking=frozenset("a"),
            engines=(ASLEEP,),
            wakeable=frozenset("a"),
            exclusive=True,
            holding=True,
        ),
        [],
    ),
    "nobody waits for one that sleeps while a worker runs": (
        Snapshot(runs=(SFT,), workers=(TRAINING,), live="a", engines=(ASLEEP,), exclusive=True, holding=True),
        [Hold(False)],
    ),
    "an adapter is given to the live release's engine": (
        Snapshot(runs=(MERGE,), workers=(MERGING,), live="a", routed="a", engines=(A,), unmerged=UNMERGED),
        [LoadAdapter("a", "r1")],
    ),
    "once": (
        Snapshot(
            runs=(MERGE,),
            workers=(MERGING,),
            live="a",
            routed="a",
            engines=(replace(A, adapter=AdapterView("r1", "loading")),),
            unmerged=UNMERGED,
        ),
        [],
    ),
    "and not before that is ready": (
        Snapshot(
            runs=(MERGE,),
            workers=(MERGING,),
            live="a",
            engines=(EngineView("a", "starting"),),
            unmerged=UNMERGED,
            holding=True,
        ),
        [],
    ),
    "an adapter that is loaded answers": (
        Snapshot(runs=(MERGE,), workers=(MERGING,), live="a", routed="a", engines=(ADAPTED,), unmerged=UNMERGED),
        [Route("a", "r1")],
    ),
    "until its own release can": (
        Snapshot(
            live="r1",
            routed="a",
            routed_adapter="r1",
            engines=(ADAPTED, EngineView("r1", "starting")),
            unmerged=UNMERGED,
        ),
        [],
    ),
    "which then does": (
        Snapshot(live="r1", routed="a", routed_adapter="r1", engines=(ADAPTED, R1), unmerged=UNMERGED),
        [Route("r1"), StopEngine("a")],
    ),
    "and takes its place": (
        Snapshot(live="r1", routed="r1", engines=(R1,), unmerged=UNMERGED),
        [EndUnmerged("its release answers")],
    ),
    "its release's weights may take the place of the ones it answered on": (
        Snapshot(
            live="r1",
            routed="a",
            routed_adapter="r1",
            engines=(ADAPTED,),
            unmerged=UNMERGED,
            swappable=frozenset({"a"}),
        ),
        [Hold(True), Route(None), SwapEngine("a", "r1")],
    ),
    "an adapter whose run has failed answers no longer": (
        Snapshot(live="a", routed="a", routed_adapter="r1", engines=(ADAPTED,), unmerged=UNMERGED),
        [EndUnmerged("r1 ended, and its release did not go live")],
    ),
    "and the live release does again": (
        Snapshot(live="a", routed="a", routed_adapter="r1", engines=(ADAPTED,)),
        [Route("a")],
    ),
    "an adapter beside which another release went live has ended": (
        Snapshot(
            runs=(MERGE,),
            workers=(MERGING,),
            live="b",
            routed="a",
            routed_adapter="r1",
            engines=(ADAPTED, EngineView("b", "starting")),
            unmerged=UNMERGED,
        ),
        [EndUnmerged("b went live")],
    ),
    "a canary gets an engine beside the live one": (
        Snapshot(live="a", routed="a", engines=(A,), canary=WAITING),
        [StartEngine("b")],
    ),
    "nobody is sent to it while that starts": (
        Snapshot(live="a", routed="a", engines=(A, EngineView("b", "starting")), canary=WAITING),
        [],
    ),
    "a ready canary gets its share": (
        Snapshot(live="a", routed="a", engines=(A, B), canary=WAITING),
        [RouteCanary("b", 0.1)],
    ),
    "and keeps it": (
        Snapshot(live="a", routed="a", engines=(A, B), canary=WAITING, routed_canary=("b", 0.1)),
        [],
    ),
    "unless the share has changed": (
        Snapshot(live="a", routed="a", engines=(A, B), canary=WAITING, routed_canary=("b", 0.3)),
        [RouteCanary("b", 0.1)],
    ),
    "a canary whose engine died gets none, before that is cleared away": (
        Snapshot(
            live="a",
            routed="a",
            engines=(A, EngineView("b", "failed", "has died", was="ready")),
            canary=WAITING,
            routed_canary=("b", 0.1),
        ),
        [RouteCanary(None), StopEngine("b", DIED)],
    ),
    "a canary whose engine keeps failing goes back": (
        Snapshot(
            live="a",
            routed="a",
            engines=(A,),
            canary=WAITING,
            failures={"b": FAILED_OFTEN},
        ),
        [EndCanary("rolled back", f"its engine failed {MOST_CANDIDATE_FAILURES} times; the last time it has died")],
    ),
    "a canary with good figures goes live, and its engine stays": (
        Snapshot(
            live="a",
            routed="a",
            engines=(A, B),
            canary=GOOD,
            routed_canary=("b", 0.1),
        ),
        [EndCanary("promoted", GOOD.verdict.reason)],
    ),
    "but not while its engine starts again": (
        Snapshot(
            live="a",
            routed="a",
            engines=(A, EngineView("b", "starting")),
            canary=GOOD,
            failures={"b": Failure(1)},
        ),
        [],
    ),
    "then everybody is sent to it": (
        Snapshot(live="b", routed="a", engines=(A, B), routed_canary=("b", 0.1)),
        [RouteCanary(None), Route("b"), StopEngine("a")],
    ),
    "a canary with bad figures goes back": (
        Snapshot(
            live="a",
            routed="a",
            engines=(A, B),
            canary=BAD,
            routed_canary=("b", 0.1),
        ),
        [EndCanary("rolled back", BAD.verdict.reason)],
    ),
    "then nobody is sent to it, and its engine stops": (
        Snapshot(live="a", routed="a", engines=(A, B), routed_canary=("b", 0.1)),
        [RouteCanary(None), StopEngine("b")],
    ),
    "a canary that was promoted by hand has ended": (
        Snapshot(live="b", routed="a", engines=(A, B), canary=WAITING, routed_canary=("b", 0.1)),
        [EndCanary("promoted", "by hand"), Route("b"), StopEngine("a")],
    ),
    "a canary beside which another release went live has ended": (
        Snapshot(live="c", routed="a", engines=(A, B, EngineView("c", "starting")), canary=WAITING),
        [EndCanary("rolled back", "c went live meanwhile")],
    ),
    "exclusive: a canary has no room": (
        Snapshot(live="a", routed="a", engines=(A,), canary=WAITING, exclusive=True),
        [EndCanary("rolled back", "the lease or the memory leaves no room for its engine")],
    ),
    "a canary for whose engine the memory has run out goes back": (
        Snapshot(live="a", routed="a", engines=(A,), canary=WAITING, room=False),
        [EndCanary("rolled back", "the lease or the memory leaves no room for its engine")],
    ),
    "one whose engine runs needs no more memory": (
        Snapshot(live="a", routed="a", engines=(A, B), canary=WAITING, routed_canary=("b", 0.1), room=False),
        [],
    ),
    "no room: nobody is sent to a canary whose engine leaves for a candidate": (
        Snapshot(
            runs=(PROBE,),
            live="a",
            routed="a",
            engines=(A, B),
            canary=WAITING,
            routed_canary=("b", 0.1),
            room=False,
        ),
        [RouteCanary(None), Route(None), StopEngine("a"), StopEngine("b")],
    ),
    "a canary goes on beside a run and its candidate": (
        Snapshot(runs=(PROBE,), live="a", routed="a", engines=(A, B, R1), canary=WAITING, routed_canary=("b", 0.1)),
        [ProbeRun("r1")],
    ),
    "a canary answers its share while the live engine starts again": (
        Snapshot(live="a", engines=(B,), canary=WAITING, routed_canary=("b", 0.1), failures={"a": Failure(1)}),
        [StartEngine("a")],
    ),
    "share: an engine that measures the memory as it starts has it unchanged": (
        Snapshot(runs=(SFT,), live="a", engines=(EngineView("a", "starting"),), measures=True, holding=True),
        [],
    ),
    "share: one that does not is no reason to wait": (
        Snapshot(runs=(SFT,), live="a", engines=(EngineView("a", "starting"),), holding=True),
        [StartWorker("r1")],
    ),
    "share: a worker starts beside one that answers": (
        Snapshot(runs=(SFT,), live="a", engines=(A,), measures=True, routed="a"),
        [StartWorker("r1")],
    ),
    "share: serving goes on while training": (
        Snapshot(runs=(SFT,), workers=(WorkerView("r1", alive=True),), live="a", engines=(A,), routed="a"),
        [],
    ),
    "weights alone differ: requests wait, and the old engine takes them": (
        Snapshot(live="b", fallback="a", engines=(A,), routed="a", swappable=frozenset("a")),
        [Hold(True), Route(None), SwapEngine("a", "b")],
    ),
    "exclusive: they differ alone there too": (
        Snapshot(live="b", engines=(A,), routed="a", swappable=frozenset("a"), exclusive=True),
        [Hold(True), Route(None), SwapEngine("a", "b")],
    ),
    "while they are loaded nothing is started or stopped": (
        Snapshot(live="b", engines=(SWAPPING,), swappable=frozenset("b"), holding=True),
        [],
    ),
    "nor when the operator has changed their mind meanwhile": (
        Snapshot(live="c", engines=(SWAPPING,), swappable=frozenset("b"), holding=True),
        [],
    ),
    "then the release answers": (
        Snapshot(live="b", fallback="a", engines=(EngineView("b", "ready"),), holding=True),
        [Hold(False), Route("b")],
    ),
    "an exchange that nobody finishes ends the engine, and requests go on waiting": (
        Snapshot(live="b", engines=(EngineView("b", "failed", "nobody is at it", was="swapping"),), holding=True),
        [StopEngine("b")],
    ),
    "an engine that is wanted does not take other weights": (
        Snapshot(runs=(ASKING,), live="a", engines=(R1,), swappable=frozenset({"r1"})),
        [Hold(True), StartEngine("a")],
    ),
    "nor one that does not answer": (
        Snapshot(live="b", engines=(EngineView("a", "starting"),), swappable=frozenset("a")),
        [Hold(True), StopEngine("a"), StartEngine("b")],
    ),
    "nor one of another kind of release": (
        Snapshot(live="b", engines=(A,), routed="a"),
        [StartEngine("b")],
    ),
    "a release that does not come up gives way to the one before": (
        Snapshot(live="b", fallback="a", failures={"b": DIED}, engines=(A,), routed="a"),
        [FallBack("b", "a", "its engine does not start: it has died")],
    ),
    "one that has answered does not": (
        Snapshot(live="b", failures={"b": DIED}),
        [],
    ),
    "nor one that failed before and answers now": (
        Snapshot(live="r1", fallback="a", failures={"r1": DIED}, engines=(R1,)),
        [Route("r1")],
    ),
    "files that were never read are read before an engine starts on them, and requests wait": (
        Snapshot(live="a", unread=frozenset("a")),
        [CheckRelease("a"), Hold(True)],
    ),
    "and read once": (
        Snapshot(live="a", unread=frozenset("a"), checking=frozenset("a"), holding=True),
        [],
    ),
    "the old release answers while the new one's files are read": (
        Snapshot(live="b", unread=frozenset("b"), checking=frozenset("b"), engines=(A,), routed="a"),
        [],
    ),
    "exclusive: then too": (
        Snapshot(live="b", unread=frozenset("b"), checking=frozenset("b"), engines=(A,), routed="a", exclusive=True),
        [],
    ),
    "no room: then too": (
        Snapshot(live="b", unread=frozenset("b"), checking=frozenset("b"), engines=(A,), routed="a", room=False),
        [],
    ),
    "exclusive: but engines leave for a worker": (
        Snapshot(
            runs=(SFT,),
            live="b",
            unread=frozenset("b"),
            checking=frozenset("b"),
            engines=(A,),
            routed="a",
            exclusive=True,
        ),
        [Route(None), StopEngine("a")],
    ),
    "exclusive: nobody waits for files to be read while a worker runs": (
        Snapshot(
            runs=(SFT,),
            workers=(WorkerView("r1", alive=True),),
            live="b",
            unread=frozenset("b"),
            checking=frozenset("b"),
            exclusive=True,
        ),
        [],
    ),
    "a candidate that went live keeps the engine that was probed, and does not answer before its files are read": (
        Snapshot(live="r1", unread=frozenset({"r1"}), checking=frozenset({"r1"}), engines=(A, R1), routed="a"),
        [],
    ),
    "weights are not exchanged for those of files that were not read": (
        Snapshot(
            live="b",
            unread=frozenset("b"),
            checking=frozenset("b"),
            engines=(A,),
            routed="a",
            swappable=frozenset("a"),
        ),
        [],
    ),
    "files that were written to are read again while their engine goes on": (
        Snapshot(live="a", unread=frozenset("a"), engines=(A,), routed="a"),
        [CheckRelease("a")],
    ),
    "which, if it dies, is not started again before": (
        Snapshot(live="a", unread=frozenset("a"), checking=frozenset("a"), failures={"a": Failure(1)}),
        [],
    ),
    "a release that does not come up does not give way before its files were read": (
        Snapshot(
            live="b",
            fallback="a",
            failures={"b": DIED},
            unread=frozenset("b"),
            checking=frozenset("b"),
            engines=(A,),
            routed="a",
        ),
        [],
    ),
    "a live release that is damaged gives way": (
        Snapshot(live="b", unread=frozenset("b"), unfit={"b": "bits"}, engines=(B,), routed="b", successor="a"),
        [GiveWay("b", "a", "bits")],
    ),
    "it does not answer until the other one does, for which requests wait": (
        Snapshot(live="a", unfit={"b": "bits"}, engines=(B,), routed="b"),
        [Hold(True), Route(None), StopEngine("b"), StartEngine("a")],
    ),
    "nor while the other one's files are read": (
        Snapshot(live="a", unread=frozenset("a"), checking=frozenset("a"), unfit={"b": ""}, engines=(B,), routed="b"),
        [Hold(True), Route(None), StopEngine("b")],
    ),
    "without another one nobody answers, and nobody waits": (
        Snapshot(live="b", unread=frozenset("b"), unfit={"b": "bits"}, engines=(B,), routed="b"),
        [GiveWay("b", None, "bits")],
    ),
    "and its engine stops": (
        Snapshot(unfit={"b": "bits"}, engines=(B,), routed="b"),
        [Route(None), StopEngine("b")],
    ),
    "and that is that": (Snapshot(unfit={"b": "bits"}), []),
    "a damaged live release that nothing runs on gives way too, while a worker runs": (
        Snapshot(
            runs=(SFT,),
            workers=(WorkerView("r1", alive=True),),
            live="b",
            unread=frozenset("b"),
            unfit={"b": "bits"},
            successor="a",
            exclusive=True,
        ),
        [GiveWay("b", "a", "bits")],
    ),
    "a run is not compared with a live release before its files were read": (
        Snapshot(runs=(RunView("r1", "running", "verify"),), live="a", unread=frozenset("a"), exclusive=True),
        [CheckRelease("a")],
    ),
    "nor with a damaged one": (
        Snapshot(
            runs=(RunView("r1", "running", "verify"),),
            live="b",
            unread=frozenset("b"),
            unfit={"b": "bits"},
            exclusive=True,
        ),
        [GiveWay("b", None, "bits")],
    ),
    "other stages do not wait for that": (
        Snapshot(runs=(SFT,), live="a", unread=frozenset("a"), checking=frozenset("a"), exclusive=True),
        [StartWorker("r1")],
    ),
    "a release from elsewhere repeats what it said there before it answers": (
        Snapshot(live="b", unproven=frozenset("b"), engines=(A, B), routed="a"),
        [Replay("b")],
    ),
    "and is asked once": (
        Snapshot(live="b", unproven=frozenset("b"), engines=(A, replace(B, replay=ReplayView("asking"))), routed="a"),
        [],
    ),
    "not before its engine is ready": (
        Snapshot(live="b", unproven=frozenset("b"), engines=(A, EngineView("b", "starting")), routed="a"),
        [],
    ),
    "exclusive: requests wait for that": (
        Snapshot(live="b", unproven=frozenset("b"), engines=(B,), holding=True, exclusive=True),
        [Replay("b")],
    ),
    "a canary from elsewhere does so too": (
        Snapshot(live="a", routed="a", engines=(A, B), canary=WAITING, unproven=frozenset("b")),
        [Replay("b")],
    ),
    "a canary's files are read before an engine starts on them": (
        Snapshot(live="a", routed="a", engines=(A,), canary=WAITING, unread=frozenset("b")),
        [CheckRelease("b")],
    ),
    "one that answers goes on while they are read again": (
        Snapshot(
            live="a",
            routed="a",
            engines=(A, B),
            canary=WAITING,
            routed_canary=("b", 0.1),
            unread=frozenset("b"),
            checking=frozenset("b"),
        ),
        [],
    ),
    "a canary that is damaged goes back": (
        Snapshot(
            live="a",
            routed="a",
            engines=(A, B),
            canary=WAITING,
            routed_canary=("b", 0.1),
            unread=frozenset("b"),
            unfit={"b": "bits"},
        ),
        [EndCanary("rolled back", "bits")],
    ),
    "no room: the old engine leaves before the new one starts": (
        Snapshot(live="b", engines=(A,), routed="a", room=False),
        [Hold(True), Route(None), StopEngine("a")],
    ),
    "no room: nothing leaves where nothing is to start": (
        Snapshot(runs=(ASKING,), live="a", engines=(A, R1), routed="a", room=False),
        [],
    ),
    "no room: a candidate is probed alone": (
        Snapshot(runs=(PROBE,), live="a", engines=(R1,), room=False),
        [ProbeRun("r1")],
    ),
    "an engine that failed is started again when it has rested, ever longer": (
        Snapshot(now=2.0, live="a", failures={"a": Failure(2, 0.0)}),
        [StartEngine("a")],
    ),
    "and not before": (Snapshot(now=1.9, live="a", failures={"a": Failure(2, 0.0)}), []),
    "but never longer than so long": (
        Snapshot(now=LONGEST_REST_SECONDS, live="a", failures={"a": Failure(99, 0.0)}),
        [StartEngine("a")],
    ),
    "each failure is held against the release beside those before": (
        Snapshot(live="a", engines=(DEAD,), failures={"a": Failure(4)}),
        [StopEngine("a", Failure(5, 0.0, "has died"))],
    ),
    "but not beside those before it had served for long": (
        Snapshot(
            live="a",
            engines=(replace(DEAD, was="ready", served=LONGEST_REST_SECONDS + 1),),
            failures={"a": Failure(4)},
        ),
        [StopEngine("a", DIED)],
    ),
    "an exchange that failed says nothing of the release where nothing else was to take its place": (
        Snapshot(live="b", engines=(replace(NOT_LOADED, before="c"),), holding=True),
        [StopEngine("b")],
    ),
    "weights that do not load give way to those before": (
        Snapshot(live="b", fallback="a", engines=(NOT_LOADED,), holding=True),
        [FallBack("b", "a", "its weights could not be loaded in place: no such weights")],
    ),
    "which are loaded again, and requests go on waiting": (
        Snapshot(live="a", engines=(NOT_LOADED,), holding=True),
        [SwapEngine("b", "a")],
    ),
    "an engine that takes neither is stopped": (
        Snapshot(live="a", engines=(replace(NOT_LOADED, release="a", before="b"),), holding=True),
        [StopEngine("a")],
    ),
    "one that does not wake gives way to nothing": (
        Snapshot(live="b", fallback="a", engines=(replace(NOT_LOADED, was="waking"),), holding=True, exclusive=True),
        [StopEngine("b")],
    ),
    "a candidate whose probes were answered is concluded": (
        Snapshot(runs=(replace(PROBE, probe=ProbeView("answered")),), live="a", engines=(A, R1), routed="a"),
        [Conclude("r1")],
    ),
    "well or not": (
        Snapshot(runs=(replace(PROBE, probe=ProbeView("answered", "odd")),), live="a", engines=(A, R1), routed="a"),
        [Conclude("r1")],
    ),
    "where the engine has served other weights one of its own is asked": (
        Snapshot(
            runs=(replace(PROBE, probe=ProbeView("answered", "odd")),),
            engines=(replace(R1, fresh=False),),
            exclusive=True,
        ),
        [StopEngine("r1")],
    ),
    "but not where nothing is wrong": (
        Snapshot(
            runs=(replace(PROBE, probe=ProbeView("answered")),), engines=(replace(R1, fresh=False),), exclusive=True
        ),
        [Conclude("r1")],
    ),
    "a candidate whose engine refuses a probe fails": (
        Snapshot(runs=(replace(PROBE, probe=ProbeView("refused", "too long")),), engines=(R1,)),
        [FailRun("r1", "probe", "too long")],
    ),
    "where that has served other weights, one of its own is asked": (
        Snapshot(runs=(replace(PROBE, probe=ProbeView("refused", "no")),), engines=(replace(R1, fresh=False),)),
        [StopEngine("r1")],
    ),
    "an engine that does not answer its probes has failed": (
        Snapshot(runs=(replace(PROBE, probe=ProbeView("unanswered", "says 500")),), engines=(R1,)),
        [StopEngine("r1", Failure(1, 0.0, "says 500"))],
    ),
    "and is stopped once": (
        Snapshot(
            runs=(replace(PROBE, probe=ProbeView("unanswered", "says 500")),),
            engines=(EngineView("r1", "draining"),),
        ),
        [],
    ),
    "a candidate that is given up gets no engine any more": (
        Snapshot(runs=(PROBE,), failures={"r1": Failure(MOST_CANDIDATE_FAILURES, reason="has died")}),
        [FailRun("r1", "engine", "its engine failed 3 times; the last time it has died")],
    ),
    "that the live release answers is put on record": (
        Snapshot(live="a", engines=(A,), routed="a", answered=False),
        [RecordAnswer("a")],
    ),
    "an adapter that the engine refuses has ended": (
        Snapshot(
            runs=(MERGE,),
            workers=(MERGING,),
            live="a",
            routed="a",
            engines=(replace(A, adapter=AdapterView("r1", "refused", "its rank is too large")),),
            unmerged=UNMERGED,
        ),
        [EndUnmerged("its rank is too large")],
    ),
    "what a release repeated is put on record": (
        Snapshot(live="b", unproven=frozenset("b"), engines=(replace(B, replay=ReplayView("answered")),)),
        [ConcludeReplay("b"), Hold(True)],
    ),
    "one whose engine did not answer is asked again in a while": (
        Snapshot(live="b", unproven=frozenset("b"), engines=(replace(B, replay=UNANSWERED),), holding=True),
        [],
    ),
    "namely then": (
        Snapshot(
            now=REPLAY_REST_SECONDS,
            live="b",
            unproven=frozenset("b"),
            engines=(replace(B, replay=UNANSWERED),),
            holding=True,
        ),
        [Replay("b")],
    ),
    "and an engine that does not answer then either has failed": (
        Snapshot(
            live="b",
            unproven=frozenset("b"),
            engines=(replace(B, replay=replace(UNANSWERED, tries=MOST_REPLAY_TRIES)),),
            holding=True,
        ),
        [StopEngine("b", Failure(1, 0.0, "did not answer when it was asked for reference answers"))],
    ),
    "nothing is started while it could not be recorded": (
        Snapshot(runs=(RunView("r1", "queued", "sft"),), live="a", now=1.0, unwritten=0.0, holding=True),
        [],
    ),
    "but a while later": (
        Snapshot(runs=(RunView("r1", "queued", "sft"),), live="a", now=WRITE_REST_SECONDS, unwritten=0.0, holding=True),
        [StartWorker("r1"), StartEngine("a")],
    ),
    "a worker that was killed is not killed at each look": (
        Snapshot(
            runs=(RunView("r1", "stopping", "sft"),),
            workers=(WorkerView("r1", alive=True, told_to_stop=True, overdue=True, killed=True),),
        ),
        [],
    ),
    "a worker that was never started is not lost": (
        Snapshot(runs=(SFT,), workers=(WorkerView("r1", alive=False, begun=False),)),
        [ForgetWorker("r1", lost=False)],
    ),
    "a run whose files are damaged fails alone": (
        Snapshot(
            runs=(replace(SFT, outcome="damaged", fault="result.json is cut"), RunView("r2", "queued", "sft")),
            live="a",
            engines=(A,),
            routed="a",
        ),
        [FailRun("r1", "damaged", "result.json is cut")],
    ),
    "one whose files cannot be looked at waits": (Snapshot(runs=(replace(SFT, outcome="unknown"),)), []),
    "a run whose work is to be discarded stops so": (
        Snapshot(runs=(RunView("r1", "stopping", "sft", wish="discard"),)),
        [StopRun("r1", discard=True)],
    ),
    "a training that is to be kept is told to end": (
        Snapshot(runs=(replace(SFT, wish="keep"),), workers=(TRAINING,)),
        [EndStage("r1")],
    ),
    "once it has been, it goes on to that end": (
        Snapshot(runs=(replace(SFT, wish="keep", ending=True),), workers=(TRAINING,)),
        [],
    ),
    "a run that stops before its turn disturbs no other": (
        Snapshot(runs=(RunView("old", "stopping", "sft"), SFT), workers=(TRAINING,)),
        [StopRun("old")],
    ),
    "no room: the first engine is tried all the same": (
        Snapshot(live="a", room=False),
        [Hold(True), StartEngine("a")],
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_decide(case: str) -> None:
    snapshot, expected = TABLE[case]
    assert decide(snapshot) == expected
