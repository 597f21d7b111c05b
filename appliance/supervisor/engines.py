"""What the supervisor needs of an engine. serve/engines implements it; the core never imports that."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from appliance.api import Precision
from appliance.data.tokenizer import TemplateSettings
from appliance.errors import Conflict


@dataclass(frozen=True)
class Probe:
    """A prompt whose rendering and stopping are checked on the real engine.

    `token_ids` is how the trainer's tokenizer renders `messages` with a generation prompt. The answer may take
    `max_tokens` or what the context leaves, `thought_tokens` of them for a thought that the template knows.
    """

    messages: list[dict[str, Any]]
    token_ids: list[int]
    max_tokens: int
    thought_tokens: int = 0
    base_ends: bool = True
    """Whether the base ends its answer too, as far as anybody has looked."""
    tools: list[dict[str, Any]] | None = None
    """What the model is told that it can call."""


@dataclass(frozen=True)
class ProbeAnswer:
    """The engine's token ids for the same messages, and how its greedy answer ended."""

    token_ids: list[int]
    text: str
    """What it says, after what it thinks."""
    finish_reason: str
    completion_tokens: int


@dataclass(frozen=True)
class Room:
    """Bytes that serving a model takes, and that there are for it when nothing of ours runs beside it."""

    needed: int
    available: int | None
    """None: nobody knows."""
    precision: Precision = "16-bit"
    """In which the model is served here."""

    @property
    def suffices(self) -> bool:
        return self.available is None or self.needed <= self.available

    @property
    def figures(self) -> str:
        """What serving takes and what there is, after "it takes"."""
        how = " in FP8" if self.precision == "FP8" else ""
        has = "" if self.available is None else f", of which this box has {self.available / 2**30:.1f}"
        return f"{self.needed / 2**30:.1f} GiB to be verified and served{how}{has}"

    def require(self, base: str) -> None:
        """Raise Conflict where a release of `base` could not be verified and served."""
        if not self.suffices:
            raise Conflict(
                "cannot_be_served",
                f"a release of {base} takes {self.figures}",
                'take a smaller base, or lower APPLIANCE_MAX_MODEL_LEN; end = "adapter" trains its adapter alone',
            )


SIDE_BY_SIDE = 0.45
"""Share of a GPU's memory with which two engines run on it."""


def advice_on_two(room: Room) -> str:
    """What to set so that two engines run at once, from what one takes `beside` the other; or that they cannot."""
    if not room.suffices:
        return f"this box cannot hold two engines for it: each takes {room.needed / 2**30:.1f} GiB"
    if room.precision == "32-bit":
        return "APPLIANCE_LEASE=share makes room for two engines"
    how = " in FP8" if room.precision == "FP8" else ""
    return f"APPLIANCE_LEASE=share and APPLIANCE_GPU_MEMORY_SHARE={SIDE_BY_SIDE} make room for two engines{how}"


@dataclass(frozen=True)
class EngineCommand:
    """How to start an engine process: the supervisor runs it in a process group of its own, output to a file."""

    argv: list[str]
    environment: dict[str, str]
    address: str
    """`unix:PATH`: where it will listen."""


class EngineKind(Protocol):
    """A kind of engine (vLLM, transformers)."""

    name: str
    honours: frozenset[str]
    """Names of the chat completion fields that this engine really obeys."""
    at_once: int
    """Answers that a process works on at a time; more would wait within it."""
    longest_answer: int
    """Tokens that an answer has at most."""
    token_seconds: float
    """How long a token of a slow answer may take."""
    ready_seconds: float
    """How long a start may take before it counts as failed."""

    reloads: bool
    """Whether a running process can go on with other weights."""

    measures: bool
    """Whether a process that starts measures the free memory, and ends where that changes meanwhile."""

    sleeps: bool
    """Whether a running process can give the memory of the GPU back, and take it again with `reload`."""

    adapter_rank: int
    """Largest rank of an adapter that a process can serve beside its release's weights; 0: it serves none."""

    def command(
        self,
        release: Path,
        name: str,
        socket: Path,
        template: TemplateSettings | None = None,
        precision: Precision | None = None,
    ) -> EngineCommand:
        """The command that serves the model files in `release` as model `name` on the unix socket `socket`.

        Its chat template is told the settings of `template`. `precision` is that in which it was proven; None: it is
        served as there is room for it.
        """
        ...

    async def ready(self, address: str) -> bool:
        """Whether the engine has loaded and answers. Raises OSError where this process lacks what it takes to ask."""
        ...

    async def reload(self, address: str, release: Path, name: str, clock: date | None = None) -> None:
        """Load the weights in `release` in place of those that are served, and answer as model `name`.

        One that sleeps wakes. The chat template takes `clock` for today (None: what it took before). Answers that have
        not ended break off.
        Raises ConnectionError where the engine does not answer or fails, and ApplianceError where it refuses; then
        nobody can say what it serves, until another call succeeds.
        """
        ...

    async def sleep(self, address: str) -> None:
        """Give back the GPU's memory but what the process itself takes; weights and cache are lost.

        Answers that have not ended break off, and nothing is answered until `reload`. Raises ConnectionError where the
        engine does not answer, fails or says anything else than that it sleeps, and ApplianceError where it refuses.
        """
        ...

    async def load_adapter(self, address: str, adapter: Path, name: str) -> None:
        """Answer as model `name` with the adapter in directory `adapter` on the weights that are served.

        Answers that have begun go on. Safe to repeat. Raises ConnectionError where the engine does not answer or fails,
        and ApplianceError where it refuses.
        """
        ...

    async def logprobs(self, address: str, name: str, token_ids: list[int]) -> list[float] | None:
        """Of each token the log-probability after those before it, 0 for the first; None where the engine cannot say.

        Raises ConnectionError where the engine does not answer, and ApplianceError where it refuses.
        """
        ...

    def memory(self, release: Path) -> int:
        """Bytes of memory that a process for the model files in `release` will take."""
        ...

    def room(self, model: Path, *, beside: bool = False) -> Room:
        """What serving the model in `model` takes at least, what this box could give it, and in which precision.

        `beside` another engine like it, each with SIDE_BY_SIDE of the memory.
        """
        ...

    async def probe(self, address: str, name: str, probe: Probe) -> ProbeAnswer:
        """Render and answer one probe greedily. Raises ConnectionError where the engine does not answer."""
        ...
