"""Events as lines for a person."""

from __future__ import annotations

from appliance.console import event_line


def test_a_warning_says_what_to_try_and_shows_the_logs_last_lines() -> None:
    event = {"event": "warning", "stage": "sft", "message": "the sft process crashed", "next": "see the log"}
    assert event_line(event) == "sft warning: the sft process crashed — see the log"
    assert event_line({**event, "log": ["a", "b"]}).splitlines()[1:] == ["    a", "    b"]
    assert event_line({"event": "warning", "stage": "sft", "message": "x"}) == "sft warning: x"
