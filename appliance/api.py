"""The control API's shapes, shared by the daemon, the CLI and the TUI. Version 1."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    # Validators are made when a shape is first used, so that a command pays for those that it reads.
    model_config = ConfigDict(frozen=True, defer_build=True)


RunState = Literal["queued", "running", "stopping", "finished", "failed", "stopped"]
ACTIVE: tuple[RunState, ...] = ("queued", "running", "stopping")
"""States of runs that still have something to do."""
ReleaseState = Literal["verified", "verified elsewhere", "refused"]
"""verified elsewhere: its gates have run on another box only, and its archive says so of itself."""
EngineState = Literal["starting", "ready", "draining", "swapping", "sleeping", "waking", "failed"]
"""Where in its life an engine is. Draining: its last answers end, and then it stops or falls asleep. Swapping: other
weights take the place of those it serves; waking: so they do after a sleep. Failed: it is stopped, or rests."""
StopWish = Literal["pause", "keep", "discard"]
"""How a run is stopped: to be resumed, to go on with what it has learnt, or without its work."""
PullState = Literal["pulling", "done", "failed"]
CanaryOutcome = Literal["under way", "promoted", "rolled back"]
Rating = Literal["good", "bad"]
Precision = Literal["32-bit", "16-bit", "FP8"]
"""In which the linear layers of a model are served; in FP8 its other weights stay in 16 bits."""


class Problem(Shape):
    """Every error of the control API."""

    code: str
    message: str
    next: str


class Dataset(Shape):
    """An imported dataset; `id` is the hash of its canonical rows, `name` moves to the newest import of that name."""

    id: str
    name: str
    kind: Literal["messages", "preference", "unpaired"]
    rows: int
    created: float


class Piece(Shape):
    """Tokens in a row that are alike, as text."""

    text: str
    trained: bool
    special: bool


class Conversation(Shape):
    """What a model is trained on, or why it cannot be (`problem`)."""

    tokens: int = 0
    trained: int = 0
    pieces: tuple[Piece, ...] = ()
    problem: str = ""


class DatasetDiff(Shape):
    """Rows that two datasets share, how many only one of them has, and some of those."""

    shared: int
    only: tuple[int, int]
    examples: tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]


class Run(Shape):
    """One execution of a recipe. Times are Unix seconds; `reason` and `next` say why it failed and what to do."""

    id: str
    recipe: str
    base: str
    state: RunState
    stages: tuple[str, ...]
    stage: str
    """The stage that runs, or is next."""
    created: float
    started: float | None = None
    finished: float | None = None
    reason: str = ""
    next: str = ""


class Spread(Shape):
    """Many times in seconds, by two of them."""

    median: float
    p95: float


class CanaryFigures(Shape):
    """What one release has answered while a canary lasts.

    `errors` of the `requests` were the engine's. `stops`: how often answers ended for which reason. `ratings`: how
    often answers were rated what.
    """

    release: str
    requests: int
    errors: int
    stops: dict[str, int]
    seconds: dict[str, Spread]
    ratings: dict[Rating, int] = {}


class Canary(Shape):
    """A release that answers a `share` of the conversations beside the live one, or did so once.

    `reason`: what it waits for, or why it ended. `figures`: the live release's, then its own. `limits`: sentences.
    """

    release: str
    live: str
    share: float
    since: float
    ended: float | None = None
    outcome: CanaryOutcome = "under way"
    reason: str = ""
    figures: tuple[CanaryFigures, ...] = ()
    limits: tuple[str, ...] = ()


class Unmerged(Shape):
    """The adapter of a run that answers beside the weights of the live release until its own release does.

    `name`: what it is called at the endpoint. `answers`: the engine has loaded it.
    """

    run: str
    live: str
    name: str
    since: float
    answers: bool


class Check(Shape):
    """Whether the files of a release are those that its manifest lists: `read` of `bytes` have been compared so far.

    unread: they have changed since they were last compared, or never were.
    """

    release: str
    state: Literal["unread", "reading", "whole", "damaged"]
    damage: str = ""
    read: int = 0
    bytes: int = 0


class Release(Shape):
    """Merged weights with their manifest. `id` is that of the run that made it; `canary` is its newest.

    `damage`: how its files were found to be others than the manifest lists. `check`: where they are being read.
    `note`: what was seen of it on this box since: its reference answers, where it was verified elsewhere, or its gates.
    """

    id: str
    base: str
    state: ReleaseState
    created: float
    live: bool = False
    reason: str = ""
    gates: dict[str, bool] = {}
    damage: str = ""
    check: Check | None = None
    note: str = ""
    canary: Canary | None = None


class Engine(Shape):
    """One engine process, or the rest before the next one where it has failed: `reason` says why it last did."""

    release: str
    kind: str
    state: EngineState
    pid: int | None = None
    restarts: int = 0
    reason: str = ""


class Key(Shape):
    """An API key; the key itself is shown once, when it is made."""

    id: str
    name: str
    prefix: str
    created: float
    revoked: float | None = None


class NewKey(Key):
    key: str


class Model(Shape):
    """A base model on this box."""

    name: str
    bytes: int
    source: str
    context: int


class Pull(Shape):
    """A base model on its way to this box: `bytes` of `total` (0: not known yet) are here.

    `said`: what was said of it last, if anything. `problem`: why it failed.
    """

    name: str
    state: PullState
    bytes: int
    total: int
    said: str
    problem: Problem | None = None


class Gpu(Shape):
    """None: the driver does not tell."""

    name: str
    memory_total: int | None
    memory_used: int | None
    utilisation: int | None


class Hardware(Shape):
    """Sizes in bytes, load in percent."""

    cores: int
    cpu_load: float
    memory_total: int
    memory_used: int
    disk_total: int
    disk_free: int
    gpus: tuple[Gpu, ...] = ()


class Status(Shape):
    """The box at a glance."""

    version: str
    home: str
    endpoint: str
    live: str | None
    """Release that is wanted live."""
    routed: str | None
    """Release that answers now; None: the endpoint answers 503."""
    canary: Canary | None = None
    """The one under way."""
    unmerged: Unmerged | None = None
    """The adapter that answers in place of the live release, if one does."""
    setback: str = ""
    """Why the last release that was to go live did not, or is so no longer, and what to do; empty: it is."""
    checks: tuple[Check, ...] = ()
    """Releases whose files are being read."""
    engines: tuple[Engine, ...]
    lease: Literal["share", "exclusive"]
    queued: int
    running: str | None
    hardware: Hardware


class Serving(Shape):
    """Bytes that verifying and serving a release takes at least, and that this box could give it (None: unknown)."""

    needed: int
    available: int | None
    fits: bool
    precision: Precision = "16-bit"
    """In which the release would be served; FP8 where it does not fit in 16 bits."""
    two: str = ""
    """Whether two engines for it can run at once, as a canary or an adapter that answers early needs it, and how."""


class Forecasts(Shape):
    """What a recipe would take: each training stage by the fields of its `forecast` event, and serving its release."""

    stages: tuple[dict[str, Any], ...]
    serving: Serving | None
    """None: it makes no release."""


class ShippedRecipe(Shape):
    """A recipe that comes with the appliance."""

    name: str
    summary: str
    text: str


class Garbage(Shape):
    """What nothing refers to: ids of releases and datasets, other paths from the home, and what they hold on disk."""

    releases: tuple[str, ...]
    datasets: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes: int


class Page(Shape):
    """Rows `offset` to `offset + len(rows)` of `total`."""

    total: int
    offset: int
    rows: tuple[dict[str, Any], ...]
