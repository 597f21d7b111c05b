"""The gates as data, and the two that are judged from a real engine's answers. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from appliance.supervisor.engines import Probe, ProbeAnswer

SERVED = "served.json"
GATES = ("structure", "fidelity", "parity", "stopping", "quality")
"""Names of the gates, in the order in which they are numbered."""

UNMEASURED = "not measured, because "
"""How the reason of a gate begins that nothing was measured for."""
GOES_ON = 10
"""One greedy answer in so many, or in fewer, may repeat itself to its limit, as those of small models do."""
FEW_PROBES = 5
"""With fewer, every answer has to end."""


@dataclass(frozen=True)
class Gate:
    """Whether a release passes, the figures that say so, and the reason in one line."""

    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def verdicts(gates: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """Which gates of a manifest have passed, of those that were measured."""
    return {
        name: bool(gate["passed"])
        for name, gate in gates.items()
        if gate["passed"] or not str(gate["reason"]).startswith(UNMEASURED)
    }


def judge_parity(probes: Sequence[Probe], answers: Sequence[ProbeAnswer]) -> Gate:
    """Whether the engine has rendered every probe to the token ids that were trained on."""
    differing = [
        (number, probe.token_ids, answer.token_ids)
        for number, (probe, answer) in enumerate(zip(probes, answers, strict=True))
        if probe.token_ids != answer.token_ids
    ]
    figures: dict[str, Any] = {"probes": len(probes), "equal": len(probes) - len(differing)}
    if not differing:
        return Gate(True, figures, f"the engine renders all {len(probes)} prompts as the trainer does")
    number, ours, theirs = differing[0]
    position = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    figures["first_difference"] = {
        "probe": number,
        "position": position,
        "trainer": ours[position : position + 8],
        "engine": theirs[position : position + 8],
    }
    return Gate(
        False,
        figures,
        f"the engine renders {len(differing)} of {len(probes)} prompts otherwise than the trainer; "
        f"the first differs at token {position}",
    )


def judge_stopping(probes: Sequence[Probe], answers: Sequence[ProbeAnswer]) -> Gate:
    """Whether the greedy answers ended by an end-of-turn token before their limits.

    Those that the base does not end either are not judged. Of FEW_PROBES others and more, one in GOES_ON need not end.
    """
    endless = [
        number
        for number, (probe, answer) in enumerate(zip(probes, answers, strict=True))
        if answer.finish_reason != "stop" and probe.base_ends
    ]
    of_base = sum(not probe.base_ends for probe in probes)
    judged = len(probes) - of_base
    may = math.ceil(judged / GOES_ON) if judged >= FEW_PROBES else 0
    figures = {
        "probes": len(probes),
        "stopped": sum(answer.finish_reason == "stop" for answer in answers),
        "endless": endless,
        "endless_limit": may,
        "endless_of_base": of_base,
        "longest": max(answer.completion_tokens for answer in answers),
        "room": min(probe.max_tokens for probe in probes),
        "thought_room": max(probe.thought_tokens for probe in probes),
    }
    if not endless:
        besides = f" but those {of_base} that the base does not end either" if of_base else " by themselves"
        return Gate(True, figures, f"all {len(probes)} answers end{besides}")
    cut = answers[endless[0]].completion_tokens
    said = f"{len(endless)} of {len(probes)} answers do not end, the first not within {cut} tokens; {may} may do so"
    return Gate(len(endless) <= may, figures, said)


@dataclass(frozen=True)
class Scored:
    """A conversation by which the engine is asked how likely it finds the trained tokens."""

    token_ids: list[int]
    positions: list[int]
    """Of the trained tokens."""
    logps: list[float]
    """What the adapter says of them, in nats."""


@dataclass(frozen=True)
class Served:
    """What the engine's log-probabilities are held against."""

    conversations: list[Scored]
    limit: float
    """Nats that a log-probability may be apart on average."""


def judge_served(served: Served, said: Sequence[Sequence[float]]) -> Gate:
    """Gate 2 once more on what is served: `said` are the engine's log-probabilities of every token, by conversation."""
    apart = [
        abs(logps[position] - expected)
        for one, logps in zip(served.conversations, said, strict=True)
        for position, expected in zip(one.positions, one.logps, strict=True)
    ]
    mean = sum(apart) / len(apart)
    figures = {
        "conversations": len(said),
        "tokens": len(apart),
        "mean_difference": mean,
        "largest_difference": max(apart),
        "limit": served.limit,
    }
    reason = f"the engine's log-probabilities are {mean:.2g} nats from the adapter's on average"
    if mean <= served.limit:
        return Gate(True, figures, f"{reason}, over {len(apart)} tokens")
    return Gate(False, figures, f"{reason}, above what rounding makes of it, {served.limit:.2g}")


def load_served(run: Path) -> Served | None:
    """What `verify` has written for the engine of the run in directory `run` to say; None where nothing was trained, or
    no conversation is short enough to be asked."""
    path = run / "verify" / SERVED
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    return Served([Scored(**one) for one in content["conversations"]], content["limit"])


def load_probes(run: Path) -> list[Probe]:
    """The probes that `verify` has written for the run in directory `run`."""
    return [Probe(**probe) for probe in json.loads((run / "verify" / "probes.json").read_bytes())]
