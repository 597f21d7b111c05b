"""The gates as data, and the two that are judged from a real engine's answers. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from appliance.api import Precision
from appliance.errors import InvalidInput
from appliance.home import write_json
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
    precision: Precision = "16-bit"
    """In which the engine serves; the limit is that for it."""


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
        "precision": served.precision,
    }
    reason = f"the engine's log-probabilities are {mean:.2g} nats from the adapter's on average"
    if mean <= served.limit:
        return Gate(True, figures, f"{reason}, over {len(apart)} tokens")
    to = " to FP8" if served.precision == "FP8" else ""
    return Gate(False, figures, f"{reason}, above what rounding{to} makes of it, {served.limit:.2g}")


def save_served(run: Path, conversations: list[Scored], limit: float, fp8_limit: float | None) -> None:
    """Write what the engine of the run in directory `run` is to say, with a limit for each precision that it may have.

    `fp8_limit` is None where it cannot serve in FP8.
    """
    content = {"conversations": [asdict(one) for one in conversations], "limit": limit, "fp8_limit": fp8_limit}
    write_json(run / "verify" / SERVED, content)


def load_served(run: Path, precision: Precision) -> Served | None:
    """What `verify` has written for an engine that serves the run in directory `run` in `precision` to say.

    None where nothing was trained, or no conversation is short enough to be asked. Raises InvalidInput where nobody has
    measured what that precision makes of the model.
    """
    path = run / "verify" / SERVED
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    limit = content.get("fp8_limit") if precision == "FP8" else content["limit"]
    if limit is None:
        raise InvalidInput(
            "not_measured_in_fp8",
            "it would be served in FP8, and what that makes of it was not measured when it was verified",
            "queue its recipe again",
        )
    return Served([Scored(**one) for one in content["conversations"]], limit, precision)


def load_probes(run: Path) -> list[Probe]:
    """The probes that `verify` has written for the run in directory `run`."""
    return [Probe(**probe) for probe in json.loads((run / "verify" / "probes.json").read_bytes())]
