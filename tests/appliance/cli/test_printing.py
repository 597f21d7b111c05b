"""What the command prints of canaries and engines, and how it prints tables."""

from __future__ import annotations

import pytest

from appliance import api
from appliance.canary import FIRST_TOKEN, Comparison
from appliance.cli.box import canary_lines, engine_line
from appliance.cli.console import print_table, say


def test_a_canary_with_both_sides_figures() -> None:
    comparison = Comparison("a", "b")
    comparison.live_tally.add_answer(["stop"], {FIRST_TOKEN: 0.25})
    comparison.candidate_tally.add_answer(["length"], {})
    comparison.candidate_tally.add_error()
    comparison.candidate_tally.ratings.update(good=3, bad=1)
    canary = api.Canary(
        release="b",
        live="a",
        share=0.1,
        since=0,
        reason="waits for more requests: 98 to it",
        figures=comparison.figures(),
        limits=("goes live after 100 requests",),
    )
    assert canary_lines(canary) == [
        "b answers 10% of the conversations; waits for more requests: 98 to it",
        "a: 1 requests, 0 failed; 1 stop; first token 0.25 s (95%: 0.25 s)",
        "b: 2 requests, 1 failed; 1 length; 3 rated good, 1 rated bad",
        "goes live after 100 requests",
    ]


def test_an_engine_that_sleeps_says_for_whom() -> None:
    engine = api.Engine(release="a", kind="vllm", state="sleeping")
    assert engine_line(engine, "b") == "vllm for a asleep while b trains"
    assert engine_line(engine, None) == "vllm sleeping for a"
    assert engine_line(engine.model_copy(update={"state": "ready"}), "b") == "vllm ready for a"
    failed = engine.model_copy(update={"state": "failed", "reason": "was killed (SIGKILL)"})
    assert engine_line(failed, "b") == "vllm failed for a: the last one was killed (SIGKILL)"


def test_a_table_shows_control_characters_as_their_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "B"), [("\x1b[2J", "b")])
    assert capsys.readouterr().out == "A     B\n\u241b[2J  b\n"


def test_no_text_from_elsewhere_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    say("key of \x1b[2Jeve")
    assert capsys.readouterr().err == "key of \u241b[2Jeve\n"
