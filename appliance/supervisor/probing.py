"""What the engine that is to serve a run's model has to show: gates 3 and 4, and gate 2 once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from appliance.api import Precision
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
