"""Random histories in which everything fails that can, and faults planted in `decide`, which they or the table find."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from world import Decide, live_through

from appliance.supervisor import decide as module

HISTORIES = 300


@pytest.mark.parametrize("block", range(5))
def test_whatever_happens_the_world_comes_to_rest(block: int) -> None:
    for seed in range(block * HISTORIES // 5, (block + 1) * HISTORIES // 5):
        try:
            live_through(module.decide, seed)
        except Exception as error:
            error.add_note(f"in history {seed}")
            raise


PLANTED = {
    "no way back": ("if snapshot.live and snapshot.fallback and (reason :=", "if not snapshot and (reason :="),
    "a stage is lost for ever": ("run.losses >= MOST_LOSSES", "run.losses > 10**6"),
    "a candidate is tried for ever": ("failure.count >= MOST_CANDIDATE_FAILURES", "failure.count > 10**6"),
    "an engine that failed does not rest": (
        "for one in fit if not rests(snapshot.failures.get(one), snapshot.now)",
        "for one in fit",
    ),
    "files that nobody has read": (
        "return release in snapshot.unread and all(",
        "return release == 0 and all(",
    ),
    "requests are not taken away from an engine that stops": (
        "if (routed, adapter) != (snapshot.routed, snapshot.routed_adapter):",
        "if routed and (routed, adapter) != (snapshot.routed, snapshot.routed_adapter):",
    ),
    "an engine starts beside a worker": (
        "if snapshot.exclusive and _training(head, snapshot):",
        "if not snapshot:",
    ),
    "a worker starts beside an engine": (
        "if snapshot.exclusive and any(engine != beside for engine in snapshot.engines):",
        "if not snapshot and any(engine != beside for engine in snapshot.engines):",
    ),
    "other weights refuse a release": ("if run.probe.wrong and engine and not engine.fresh:", "if not snapshot:"),
    "a killed worker is killed at each look": (" and not worker.killed else None", " else None"),
    "what stopped as asked is lost": (" and worker.begun and not worker.told_to_stop", ""),
    "requests wait for ever": (
        "actions: list[Action] = [Hold(coming)] if coming != snapshot.holding else []",
        "actions: list[Action] = [Hold(coming)] if coming and coming != snapshot.holding else []",
    ),
    "a damaged release goes on": (
        "if snapshot.live is not None and (reason := snapshot.unfit.get(snapshot.live)):",
        "if not snapshot and (reason := snapshot.unfit.get(snapshot.live)):",
    ),
    "an engine that has failed is left": (
        'case "failed":\n            return StopEngine',
        'case "failed" if not snapshot:\n            return StopEngine',
    ),
    "two things at a time with one engine": ('case "draining" | "swapping" | "waking":', 'case "swapping":'),
    "started while it cannot be recorded": ("snapshot.now - snapshot.unwritten < WRITE_REST_SECONDS", "not snapshot"),
    "an engine that does not answer its probes is kept": (
        'case "unanswered" if engine and engine.life == "ready":',
        'case "unanswered" if not snapshot:',
    ),
    "a run that stops gets its turn before the one that trains": (
        "head = snapshot.head\n",
        'head = min(snapshot.runs, key=lambda run: run.state == "queued", default=None)\n',
    ),
    "the adapter that was refused is given for ever": (
        'if engine.adapter.state == "refused" else []',
        "if not snapshot else []",
    ),
}


def goes_wrong(decide: Decide) -> bool:
    """Whether a history does."""
    for seed in range(HISTORIES):
        try:
            live_through(decide, seed)
        except (AssertionError, LookupError):
            return True
    return False


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_in_decide_is_found_by_a_history(fault: str) -> None:
    before, after = PLANTED[fault]
    source = inspect.getsource(module)
    assert source.count(before) == 1, "the fault is planted in one place"
    planted: dict[str, Any] = {"__name__": "planted"}
    exec(compile(source.replace(before, after), "planted", "exec", dont_inherit=True), planted)
    assert goes_wrong(planted["decide"])
