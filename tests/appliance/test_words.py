"""Figures, times, events and foreign text as words."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import api
from appliance.words import (
    ago,
    duration,
    event_line,
    log_line,
    number,
    one_line,
    percent,
    size,
    trained_words,
    visible,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("bell\x07 back\x08 nul\x00 gone\x7f", "bell␇ back␈ nul␀ gone␡"),
        ("c1\x9b31m", "c1⟨U+009B⟩31m"),
        ("tab\tend\nnext", "tab end\nnext"),
        ("right\u202eleft", "right⟨U+202E⟩left"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("tag\U000e0041", "tag⟨U+E0041⟩"),
        ("ad\u200dmin", "ad⟨U+200D⟩min"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        ("[/foo] [b]", "[/foo] [b]"),
    ],
)
def test_what_controls_or_hides_is_written_out(text: str, expected: str) -> None:
    assert visible(text) == expected


@given(st.text())
def test_nothing_that_controls_is_left(text: str) -> None:
    left = {unicodedata.category(letter) for letter in visible(text).replace("\n", "")}
    assert "Cc" not in left


def test_one_line_is_cut_with_an_ellipsis() -> None:
    assert one_line("a\n  b\tc", 10) == "a b c"
    assert one_line("x" * 500, 10) == "x" * 9 + "…"
    assert one_line("x" * 500) == "x" * 500


def test_a_line_of_a_log_is_what_stands_there_in_the_end() -> None:
    assert log_line("10%\r100%\r") == "100%"
    assert log_line("\x1b[1mtwo\x1b[0m\x07") == "two␇"


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (269e6, "269 MB"), (2.1e12, "2.1 TB")]
)
def test_size(count: float, expected: str) -> None:
    assert size(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(-3, "0s"), (59.4, "59s"), (61, "1m 01s"), (3720, "1h 02m"), (90000, "1d 01h")]
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_ago() -> None:
    times = [ago(0, now) for now in (-5, 59, 60, 7300, 200000)]
    assert times == ["just now", "just now", "1m ago", "2h ago", "2d ago"]


def test_number() -> None:
    assert [number(value) for value in (0.47123, 1200, math.nan, 3e-7, True, None, 0.0)] == [
        "0.4712",
        "1,200",
        "nan",
        "3.0e-07",
        "True",
        "None",
        "0",
    ]


def test_percent() -> None:
    assert [percent(share) for share in (0.1, 0.07, 0.005, 0.5)] == ["10%", "7%", "0.5%", "50%"]


def test_a_warning_says_what_to_try_and_shows_the_logs_last_lines() -> None:
    event = {"event": "warning", "stage": "sft", "message": "the sft process crashed", "next": "see the log"}
    assert event_line(event) == "sft ! the sft process crashed — see the log"
    assert event_line({**event, "log": ["a", "\x1b[1mb"]}).splitlines()[1:] == ["    a", "    b"]
    assert event_line({"event": "warning", "stage": "sft", "message": "x"}) == "sft ! x"


def test_a_held_out_loss_says_how_sure_it_is() -> None:
    event = {"event": "eval", "stage": "sft", "step": 20, "loss": 2.0312}
    assert event_line(event) == "sft step 20: held-out loss 2.031"
    assert event_line({**event, "interval": [1.9062, 2.1562]}) == "sft step 20: held-out loss 2.031 ± 0.125"


def test_a_step_whose_loss_is_no_number() -> None:
    step = {"event": "step", "stage": "sft", "step": 1, "steps": 9, "loss": None, "eta_seconds": 61}
    assert event_line({**step, "tokens_per_second": 1234.5}) == "sft step 1/9: loss nan, 1,234 tok/s, 1m 01s left"


def test_a_failure_is_told_whole() -> None:
    event = {"event": "failed", "stage": "sft", "reason": "long " * 100 + "end", "next": "try"}
    assert event_line(event).endswith("end — try")


def test_what_is_trained_is_in_brackets() -> None:
    said = [("be", False), (" kind", True), ("\x00", True), ("end", False), ("x", True)]
    pieces = tuple(api.Piece(text=text, trained=trained, special=False) for text, trained in said)
    words = trained_words(api.Conversation(pieces=pieces))
    assert "".join(word.text for word in words) == "be⟦ kind␀⟧end⟦x⟧"
