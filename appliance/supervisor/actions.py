"""What the supervisor can do, one class for each action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from appliance.supervisor.snapshot import Failure


@dataclass(frozen=True)
class StartWorker:
    """Start the process of the run's present stage."""

    run: str


@dataclass(frozen=True)
class StopWorker:
    """Ask it to write a checkpoint and end."""

    run: str


@dataclass(frozen=True)
class KillWorker:
    """It was asked to end and does not."""

    run: str


@dataclass(frozen=True)
class EndStage:
    """Let its training end at the next step and the run go on with what it has learnt."""

    run: str


@dataclass(frozen=True)
class WarnOfSilence:
    """Tell people that the worker may hang."""

    run: str


@dataclass(frozen=True)
class ForgetWorker:
    """Its process is gone. `lost`: it left no result, and nobody had asked it to end."""

    run: str
    lost: bool


@dataclass(frozen=True)
class Advance:
    """The present stage is done: go on to the next."""

    run: str


@dataclass(frozen=True)
class RetryStage:
    """It ran out of memory beside an engine that sleeps: start it once more, without that."""

    run: str


@dataclass(frozen=True)
class FailRun:
    """`why`: the stage's own failure.json, too many lost processes, or else what `reason` says: an engine that fails
    again and again, probes that it refuses, files that cannot be understood."""

    run: str
    why: Literal["stage", "losses", "engine", "probe", "damaged"]
    reason: str = ""


@dataclass(frozen=True)
class StopRun:
    """It was asked to stop, and nothing of it runs any more. `discard`: what its stages have made is taken away."""

    run: str
    discard: bool = False


@dataclass(frozen=True)
class ProbeRun:
    """Ask the candidate's engine the probes, then conclude."""

    run: str


@dataclass(frozen=True)
class Conclude:
    """Write the manifest, record the release, finish the run."""

    run: str


@dataclass(frozen=True)
class StartEngine:
    release: str


@dataclass(frozen=True)
class StopEngine:
    """Let its last answers end, then its whole process group. `failure`: what is held against its release."""

    release: str
    failure: Failure | None = None


@dataclass(frozen=True)
class SleepEngine:
    """Let its process give the memory of the GPU back after its last answer, and stay."""

    release: str


@dataclass(frozen=True)
class SwapEngine:
    """Load the weights of `new` into the process that serves `old`, after its last answer, or that sleeps."""

    old: str
    new: str


@dataclass(frozen=True)
class LoadAdapter:
    """Give the engine of `release` the adapter of `run`."""

    release: str
    run: str


@dataclass(frozen=True)
class EndUnmerged:
    """The adapter answers no longer."""

    reason: str


@dataclass(frozen=True)
class FallBack:
    """`release`, if it is live still, does not come up: `to`, which was live before, is so again."""

    release: str
    to: str
    reason: str


@dataclass(frozen=True)
class CheckRelease:
    """Read its files, to see whether they are still those that its manifest lists."""

    release: str


@dataclass(frozen=True)
class Replay:
    """Ask the engine of a release that was verified elsewhere for the reference answers in its manifest."""

    release: str


@dataclass(frozen=True)
class ConcludeReplay:
    """Record what those answers say of it."""

    release: str


@dataclass(frozen=True)
class RecordAnswer:
    """`release`, if it is live still, answers for the first time since it went live."""

    release: str


@dataclass(frozen=True)
class GiveWay:
    """`release`, if it is live still, may not be served any more: `to` is live instead; None: nothing is."""

    release: str
    to: str | None
    reason: str


@dataclass(frozen=True)
class Route:
    """Let this release's engine answer the endpoint; None: nobody answers. `adapter`: with the adapter of this run."""

    release: str | None
    adapter: str | None = None


@dataclass(frozen=True)
class RouteCanary:
    """Let this release's engine answer the share of the conversations; None: the live one answers all."""

    release: str | None
    share: float = 0.0


@dataclass(frozen=True)
class EndCanary:
    """Record what became of the canary; `promoted` makes it live."""

    outcome: Literal["promoted", "rolled back"]
    reason: str


@dataclass(frozen=True)
class Hold:
    """Whether new requests wait while nobody answers: an engine is on its way that has not failed yet."""

    on: bool


RunAction = (
    StartWorker
    | StopWorker
    | KillWorker
    | EndStage
    | WarnOfSilence
    | ForgetWorker
    | Advance
    | RetryStage
    | FailRun
    | StopRun
    | ProbeRun
    | Conclude
)
"""What concerns one run, `run`, and no other."""
Start = StartWorker | StartEngine
"""What starts a process, and so has to be recorded."""
Action = (
    RunAction
    | StartEngine
    | StopEngine
    | SleepEngine
    | SwapEngine
    | LoadAdapter
    | EndUnmerged
    | FallBack
    | CheckRelease
    | Replay
    | ConcludeReplay
    | RecordAnswer
    | GiveWay
    | Route
    | RouteCanary
    | EndCanary
    | Hold
)
