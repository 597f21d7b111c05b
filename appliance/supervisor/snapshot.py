"""What decisions rest on: the runs, the processes and the routes at one moment, and what became of each effect."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from appliance.api import EngineState, StopWish
from appliance.canary import Comparison, Limits, Verdict, judge

Outcome = Literal["none", "done", "failed", "damaged", "unknown"]


@dataclass(frozen=True)
class ProbeView:
    """What became of asking a candidate's engine the probes. `wrong`: what speaks against the release in its answers,
    or against the engine where it has not answered, or has refused to."""

    state: Literal["asking", "answered", "refused", "unanswered"]
    wrong: str = ""


@dataclass(frozen=True)
class RunView:
    """An active run. `outcome` is what the files of its present stage say.

    Damaged: they cannot be understood, as `fault` says. Unknown: they could not be looked at.
    """

    id: str
    state: Literal["queued", "running", "stopping"]
    stage: str
    outcome: Outcome = "none"
    losses: int = 0
    refused: bool = False
    """Verify has refused it: no engine is needed to say so."""
    short_of_memory: bool = False
    """That is why its stage has failed."""
    fault: str = ""
    wish: StopWish | Literal[""] = ""
    """What a person has asked for, and is not done yet."""
    ending: bool = False
    """Its training stage has been told to end and to keep what it has learnt."""
    probe: ProbeView | None = None

    @property
    def needs_engine(self) -> bool:
        return self.stage == "probe"


@dataclass(frozen=True)
class WorkerView:
    """A worker process on record: the run it works for, and whether it was asked to end.

    `begun`: it was started; else nothing but its record was made. `overdue`: it has had its time to end. `killed`: it
    was killed a moment ago. `silent`: it has said nothing for so long that it may hang.
    """

    run: str
    alive: bool
    told_to_stop: bool = False
    overdue: bool = False
    killed: bool = False
    silent: bool = False
    begun: bool = True


@dataclass(frozen=True)
class AdapterView:
    """The adapter of `run` on an engine: it is being loaded, it answers, or `reason` says why it cannot."""

    run: str
    state: Literal["loading", "loaded", "refused"]
    reason: str = ""


@dataclass(frozen=True)
class ReplayView:
    """What became of asking an engine for its release's reference answers: so many `tries`, the last one at `at`."""

    state: Literal["asking", "answered", "unanswered"]
    tries: int = 1
    at: float = -math.inf


@dataclass(frozen=True)
class EngineView:
    """An engine on record.

    One that has failed was something else before, `was`, and `reason` says why. Where other weights did not load,
    `before` is the release whose weights they were to take the place of. `fresh`: it has served no weights but those
    with which it was started. `served`: for so many seconds it has answered.
    """

    release: str
    life: EngineState
    reason: str = ""
    was: EngineState = "starting"
    before: str = ""
    fresh: bool = True
    served: float = 0.0
    adapter: AdapterView | None = None
    replay: ReplayView | None = None


@dataclass(frozen=True)
class Failure:
    """So often in a row a release's engine has failed, the last time at `at`, for that reason."""

    count: int
    at: float = -math.inf
    reason: str = ""


@dataclass(frozen=True)
class CanaryView:
    """The canary under way, the live release that it is compared with, and the figures of both."""

    release: str
    live: str
    share: float
    comparison: Comparison
    limits: Limits = field(default_factory=Limits)

    @property
    def verdict(self) -> Verdict:
        """What these figures say."""
        return judge(self.comparison.live_tally, self.comparison.candidate_tally, self.limits)


@dataclass(frozen=True)
class UnmergedView:
    """The adapter of `run` that is to answer on the engine of the release `live` until its own release does."""

    run: str
    live: str


@dataclass(frozen=True)
class Snapshot:
    """All that decisions rest on. `runs` are the active ones, oldest first. Times are seconds of one clock."""

    now: float = 0.0
    unwritten: float = -math.inf
    """When the database last did not take what was to be written."""
    runs: tuple[RunView, ...] = ()
    workers: tuple[WorkerView, ...] = ()
    engines: tuple[EngineView, ...] = ()
    failures: dict[str, Failure] = field(default_factory=dict)
    """By release."""
    live: str | None = None
    answered: bool = True
    """The live release has answered since it went live, and that is on record."""
    fallback: str | None = None
    """What was live before, as long as the live release has never answered."""
    successor: str | None = None
    """What is to be live where the live release may not be served any more."""
    unread: frozenset[str] = frozenset()
    """The live release and the canary, where something was written to their files since these were found whole."""
    checking: frozenset[str] = frozenset()
    """Releases whose files are being read."""
    unproven: frozenset[str] = frozenset()
    """Releases from elsewhere that have not yet repeated their reference answers here."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Releases that may not be served, and why."""
    swappable: frozenset[str] = frozenset()
    """Releases whose engine could go on with the live release's weights."""
    measures: bool = False
    """An engine that starts measures the free memory, which nothing may change meanwhile."""
    sleeps: bool = False
    """An engine can sleep, and it can be seen that it does."""
    wakeable: frozenset[str] = frozenset()
    """Releases with whose weights the engine that sleeps could go on: its own, the live one, a candidate."""
    room: bool = True
    """The memory lets one more engine start."""
    routed: str | None = None
    routed_adapter: str | None = None
    """The run whose adapter answers there."""
    unmerged: UnmergedView | None = None
    canary: CanaryView | None = None
    routed_canary: tuple[str, float] | None = None
    """The release that the gateway sends a share of the conversations to, and the share."""
    holding: bool = False
    """New requests are told to wait for an engine."""
    exclusive: bool = False

    @property
    def head(self) -> RunView | None:
        """The run whose turn it is: one that has begun, else the oldest in the queue. One that stops has no turn."""
        going = (run for run in self.runs if run.state != "stopping")
        return min(going, key=lambda run: run.state == "queued", default=None)

    @property
    def training(self) -> bool:
        """Whether a worker has the machine."""
        return any(worker.alive for worker in self.workers)

    @property
    def awake(self) -> tuple[EngineView, ...]:
        """Engines that hold memory for weights, as far as is known."""
        return tuple(engine for engine in self.engines if engine.life != "sleeping")

    @property
    def sleeper(self) -> EngineView | None:
        """The engine that sleeps and can be woken."""
        return next((engine for engine in self.engines if engine.life == "sleeping"), None)

    @property
    def ready(self) -> frozenset[str]:
        """Releases whose engine answers."""
        return frozenset(engine.release for engine in self.engines if engine.life == "ready")

    def engine(self, release: str | None) -> EngineView | None:
        """That of `release`."""
        return next((engine for engine in self.engines if engine.release == release), None)
