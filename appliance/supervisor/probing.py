"""What the engine that is to serve a run's model has to show: gates 3 and 4, and gate 2 once more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.api import Precision
from appliance.errors import ApplianceError, reason
from appliance.release.gates import (
    Gate,
    Served,
    judge_parity,
    judge_served,
    judge_stopping,
    load_probes,
    load_served,
)
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.snapshot import ProbeView

log = logging.getLogger(__name__)


@dataclass
class Probe:
    """The probes of one candidate, asked of one engine process: what has come of them so far."""

    view: ProbeView = field(default_factory=lambda: ProbeView("asking"))
    gates: dict[str, Gate] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    """What the release will be held against: who has answered, and what."""
    next: str = ""
    """What to do where the engine has refused."""


class Probes:
    """By run. `changed` is called when one has come to an end."""

    def __init__(self, kind: EngineKind, changed: Callable[[], None]) -> None:
        self._kind = kind
        self._changed = changed
        self._probes: dict[str, Probe] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def view(self, run: str) -> ProbeView | None:
        """What has become of the probes, asked of the engine that the run has now."""
        probe = self._probes.get(run)
        return probe.view if probe else None

    def found(self, run: str) -> Probe:
        """What was found; nothing where nobody was asked."""
        return self._probes.get(run, Probe())

    def start(self, run: str, address: str, directory: Path, precision: Precision) -> None:
        """Ask the run's engine."""
        probe = self._probes[run] = Probe()
        self._tasks[run] = asyncio.create_task(self._ask(probe, run, address, directory, precision))

    def forget(self, run: str) -> None:
        """The engine that was asked, or is being asked, is gone: what it said counts no longer."""
        self._probes.pop(run, None)
        if task := self._tasks.pop(run, None):
            task.cancel()

    def cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _ask(self, probe: Probe, run: str, address: str, directory: Path, precision: Precision) -> None:
        try:
            probe.gates, said = await ask_gates(self._kind, address, run, directory, precision)
            probe.reference = {"engine": self._kind.name, "precision": precision, "answers": said}
            wrong = "; ".join(gate.reason for gate in probe.gates.values() if not gate.passed)
            probe.view = ProbeView("answered", wrong)
        except ConnectionError as error:
            log.warning("the engine of %s did not answer its probes: %s", run, error)
            probe.view = ProbeView("unanswered", f"did not answer its probes: {error}")
        except Exception as error:
            log.warning("%s cannot be probed", run, exc_info=error)
            probe.view = ProbeView("refused", reason(error))
            probe.next = error.next if isinstance(error, ApplianceError) else ""
        self._changed()


async def ask_gates(
    kind: EngineKind, address: str, name: str, run: Path, precision: Precision
) -> tuple[dict[str, Gate], list[dict[str, Any]]]:
    """The gates as model `name`, which is served in `precision`, passes them on the probes in `run`, and its answers.

    Raises ConnectionError where the engine does not answer, and ApplianceError where it refuses a probe.
    """
    probes = load_probes(run)
    answers = [await kind.probe(address, name, probe) for probe in probes]
    gates = {"parity": judge_parity(probes, answers), "stopping": judge_stopping(probes, answers)}
    if spoken := await _spoken(kind, address, name, load_served(run, precision)):
        gates["served"] = spoken
    said = [
        {"messages": probe.messages, "text": answer.text}
        for probe, answer in zip(probes, answers, strict=True)
        if not probe.tools
    ]
    return gates, said


async def _spoken(kind: EngineKind, address: str, name: str, served: Served | None) -> Gate | None:
    """What the engine's own log-probabilities say of fidelity; None where it cannot say, or nothing was trained."""
    said: list[list[float]] = []
    for one in served.conversations if served else ():
        logps = await kind.logprobs(address, name, one.token_ids)
        if logps is None:
            return None
        said.append(logps)
    return judge_served(served, said) if served else None
