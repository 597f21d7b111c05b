"""What is said of a worker that died or is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.supervisor.watch import explain_death, last_lines, longest_silence


@pytest.mark.parametrize(
    ("status", "memory", "cause", "next"),
    [
        (None, False, "died while no daemon watched it", "see the log"),
        (3, True, "ended with exit status 3", "see the log"),
        (-9, False, "was killed (SIGKILL)", "find out who"),
        (-9, True, "was killed by the kernel because the memory ran out", "smaller max_length"),
        (-15, True, "was killed (SIGTERM)", "find out who"),
        (-11, False, "crashed (SIGSEGV)", "driver"),
        (-6, True, "crashed (SIGABRT)", "driver"),
    ],
)
def test_a_death_has_a_cause_and_a_way_on(status: int | None, memory: bool, cause: str, next: str) -> None:
    death = explain_death(status, memory)
    assert death.cause == cause
    assert next in death.next
    assert death.out_of_memory == ("memory" in cause)


def test_the_logs_last_lines_with_text(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_lines(log) == []
    log.write_text("x" * 9000 + "\n" + "\n".join(f"line {number}\n" for number in range(9)))
    assert last_lines(log) == [f"line {number}" for number in range(4, 9)]


def steps(*times: float) -> list[dict[str, Any]]:
    return [{"event": "step", "time": time} for time in times]


def test_how_long_a_silence_may_be() -> None:
    started = [{"event": "stage_started", "time": 0.0}]
    assert longest_silence(started + steps(1.0))[0] == 1800
    assert longest_silence(started + steps(*range(0, 40, 2)))[0] == 60, "never less than a minute"
    assert longest_silence(started + steps(*range(0, 400, 10), 1000))[0] == 200, "one long step changes nothing"
    assert longest_silence(steps(0, 10, 20) + started + steps(1.0))[0] == 1800, "another worker's steps do not count"
    assert longest_silence([]) == (1800, "it has not begun to train")
