"""What the silence or the death of a worker means, for a person. Pure, but for reading the log's end."""

from __future__ import annotations

import itertools
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST_SILENCE_SECONDS = 60.0
SILENT_STEPS = 20
"""A worker that says nothing for so many median steps may hang."""
SILENCE_BEFORE_STEPS_SECONDS = 1800.0
"""The same for one that has not taken two steps: it may be loading, tokenising or merging."""
STEPS_COMPARED = 50
LINES_SHOWN = 5


@dataclass(frozen=True)
class Death:
    """How a process ended, as the rest of a sentence, and what to try."""

    cause: str
    next: str
    out_of_memory: bool = False


def explain_death(status: int | None, memory_ran_out: bool) -> Death:
    """`status` is that of waitpid, None where nobody of ours could wait; `memory_ran_out`: the kernel has killed."""
    if status is None:
        return Death("died while no daemon watched it", "see the log")
    if status >= 0:
        return Death(f"ended with exit status {status}", "see the log")
    name = signal.Signals(-status).name
    if -status == signal.SIGKILL and memory_ran_out:
        return Death(
            "was killed by the kernel because the memory ran out",
            "set a smaller max_length or adapter rank, or end other programs",
            out_of_memory=True,
        )
    if -status in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Death(f"was killed ({name})", "find out who ends processes on this box")
    return Death(f"crashed ({name})", "a library or a driver is at fault: see the log, and `appliance doctor`")


def last_lines(log: Path) -> list[str]:
    """The last lines with text in a log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()][-LINES_SHOWN:]


def longest_silence(events: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """After how many seconds without an event a worker may hang, and why so many, as the rest of a sentence."""
    started = max((at for at, event in enumerate(events) if event["event"] == "stage_started"), default=0)
    times = [event["time"] for event in events[started:] if event["event"] == "step"][-STEPS_COMPARED:]
    if len(times) < 2:
        return SILENCE_BEFORE_STEPS_SECONDS, "it has not begun to train"
    step = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
    return max(SILENT_STEPS * step, LEAST_SILENCE_SECONDS), f"a step takes {step:.1f} s as a rule"
