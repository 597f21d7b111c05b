"""What decisions rest on: the runs, the processes and the routes at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from appliance.canary import Verdict

Outcome = Literal["none", "done", "failed"]


@dataclass(frozen=True)
class RunView:
    """An active run. `outcome` is what the files of its present stage say."""

    id: str
    state: Literal["queued", "running", "stopping"]
    stage: str
    outcome: Outcome = "none"
    losses: int = 0
    refused: bool = False
    """Verify has refused it: no engine is needed to say so."""
    short_of_memory: bool = False
    """That is why its stage has failed."""

    @property
    def needs_engine(self) -> bool:
        return self.stage == "probe"


@dataclass(frozen=True)
class WorkerView:
    """A worker process on record: the run it works for, and whether it was asked to end.

    `overdue`: it has had its time to do so. `silent`: it has said nothing for so long that it may hang.
    """

    run: str
    alive: bool
    told_to_stop: bool = False
    overdue: bool = False
    silent: bool = False


@dataclass(frozen=True)
class EngineView:
    """An engine process on record. `overdue`: it has had its time to become ready, or has stopped answering.

    `swapping`: this release's weights take the place of another's. `abandoned`: so it was, and nobody is at it any
    more, so that it may serve whatever, or it sleeps and nobody knows how well. `falling_asleep`: it is giving the
    memory of the GPU back; `asleep`: it has, and nothing is sent to it. `adapter`: the run whose adapter it can answer
    with; `loading`: it is being given one.
    """

    release: str
    alive: bool
    ready: bool = False
    overdue: bool = False
    swapping: bool = False
    abandoned: bool = False
    falling_asleep: bool = False
    asleep: bool = False
    adapter: str | None = None
    loading: bool = False


@dataclass(frozen=True)
class CanaryView:
    """The canary under way: the live release that it is compared with, and what its figures say."""

    release: str
    live: str
    share: float
    verdict: Verdict


@dataclass(frozen=True)
class UnmergedView:
    """The adapter of `run` that is to answer on the engine of the release `live` until its own release does."""

    run: str
    live: str


@dataclass(frozen=True)
class Snapshot:
    """All that decisions rest on. `runs` are the active ones, oldest first."""

    runs: tuple[RunView, ...] = ()
    workers: tuple[WorkerView, ...] = ()
    engines: tuple[EngineView, ...] = ()
    live: str | None = None
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
    replaying: frozenset[str] = frozenset()
    """Releases whose engine is being asked for them."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Releases that may not be served, and why."""
    swappable: frozenset[str] = frozenset()
    """Releases whose engine could go on with the live release's weights."""
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
    probing: frozenset[str] = frozenset()
    """Runs whose probe is under way."""
    stopping_engines: frozenset[str] = frozenset()
    """Releases whose engine is being stopped."""
    failures: dict[str, int] = field(default_factory=dict)
    """Engine failures in a row, by release."""
    resting: frozenset[str] = frozenset()
    """Releases whose engine failed a moment ago and is not started again yet."""

    @property
    def head(self) -> RunView | None:
        """The run whose turn it is: one that has begun, else the oldest in the queue."""
        return min(self.runs, key=lambda run: run.state == "queued", default=None)

    @property
    def awake(self) -> tuple[EngineView, ...]:
        """Engines that hold memory for weights, as far as is known."""
        return tuple(engine for engine in self.engines if not engine.asleep)

    @property
    def sleeper(self) -> EngineView | None:
        """The engine that sleeps and can be woken."""
        sleepers = (engine for engine in self.engines if engine.asleep and engine.alive)
        return next((engine for engine in sleepers if engine.release not in self.stopping_engines), None)

    @property
    def ready(self) -> frozenset[str]:
        """Releases whose engine answers."""
        return frozenset(
            engine.release
            for engine in self.engines
            if engine.alive and engine.ready and engine.release not in self.stopping_engines
        )
