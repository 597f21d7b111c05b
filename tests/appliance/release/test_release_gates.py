from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.errors import InvalidInput
from appliance.release.gates import (
    Scored,
    Served,
    judge_parity,
    judge_served,
    judge_stopping,
    load_probes,
    load_served,
    save_served,
)
from appliance.supervisor.engines import Probe, ProbeAnswer

PROBES = [Probe([{"role": "user", "content": word}], [1, 2, number], 32) for number, word in enumerate("abc")]


def answers(*token_ids: list[int]) -> list[ProbeAnswer]:
    return [ProbeAnswer(ids, "text", "stop", 5) for ids in token_ids]


def test_parity_holds_where_all_ids_are_equal() -> None:
    gate = judge_parity(PROBES, answers([1, 2, 0], [1, 2, 1], [1, 2, 2]))
    assert gate.passed
    assert gate.figures == {"probes": 3, "equal": 3}


def test_parity_names_the_first_difference() -> None:
    gate = judge_parity(PROBES, answers([1, 2, 0], [1, 9, 1], [2, 1, 2, 2]))
    assert not gate.passed
    assert gate.figures["equal"] == 1
    assert gate.figures["first_difference"] == {"probe": 1, "position": 1, "trainer": [2, 1], "engine": [9, 1]}
    assert "2 of 3" in gate.reason
    assert "token 1" in gate.reason


def test_a_prompt_that_is_only_the_beginning_of_the_other_differs() -> None:
    gate = judge_parity(PROBES[:1], answers([1, 2, 0, 4]))
    assert not gate.passed
    assert gate.figures["first_difference"] == {"probe": 0, "position": 3, "trainer": [], "engine": [4]}


ENDS, GOES_ON = ProbeAnswer([1], "text", "stop", 5), ProbeAnswer([1], "text", "length", 32)


def test_stopping_has_its_figures_whatever_they_are() -> None:
    probes = [replace(PROBES[0], max_tokens=48, thought_tokens=16), *PROBES[1:]]
    gate = judge_stopping(probes, [ENDS, GOES_ON, ENDS])
    assert gate.figures == {
        "probes": 3,
        "stopped": 2,
        "endless": [1],
        "endless_limit": 0,
        "endless_of_base": 0,
        "longest": 32,
        "room": 32,
        "thought_room": 16,
    }
    assert "1 of 3" in gate.reason
    assert "32 tokens" in gate.reason
    assert judge_stopping(PROBES, [ENDS] * 3).reason == "all 3 answers end by themselves"


@pytest.mark.parametrize(
    ("probes", "endless", "passes"),
    [(2, 0, True), (2, 1, False), (5, 1, True), (5, 2, False), (10, 1, True), (10, 2, False)],
)
def test_one_answer_in_ten_may_go_on(probes: int, endless: int, passes: bool) -> None:
    answers = [GOES_ON] * endless + [ENDS] * (probes - endless)
    assert judge_stopping(PROBES[:1] * probes, answers).passed is passes


@pytest.mark.parametrize(("theirs", "passes"), [((0, 1, 2), True), ((0, 1, 2, 3), True), ((0, 1, 2, 3, 4), False)])
def test_where_the_base_goes_on_an_answer_is_not_judged(theirs: tuple[int, ...], passes: bool) -> None:
    """The base goes on in the first three of ten; one more is one in ten of those judged."""
    asked = [replace(PROBES[0], base_ends=number >= 3) for number in range(10)]
    gate = judge_stopping(asked, [GOES_ON if number in theirs else ENDS for number in range(10)])
    assert gate.passed is passes
    assert gate.figures["endless_of_base"] == 3
    assert gate.figures["stopped"] == 10 - len(theirs)
    others = judge_stopping(asked, [GOES_ON if number in (7, 8) else ENDS for number in range(10)])
    assert not others.passed, "the base's own leave no room for others"


def test_probes_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify" / "probes.json").write_text(json.dumps([vars(probe) for probe in PROBES]))
    assert load_probes(tmp_path) == PROBES


SERVED = Served([Scored([5, 6, 7], [1, 2], [-1.0, -2.0]), Scored([5, 8], [1], [-0.5])], limit=0.1)


def test_what_is_served_is_held_against_the_adapter_at_the_trained_tokens() -> None:
    gate = judge_served(SERVED, [[0.0, -1.05, -2.1], [0.0, -0.5]])
    assert gate.passed
    assert gate.figures == {
        "conversations": 2,
        "tokens": 3,
        "mean_difference": pytest.approx(0.05),
        "largest_difference": pytest.approx(0.1),
        "limit": 0.1,
        "precision": "16-bit",
    }


def test_an_engine_that_says_otherwise_is_caught_in_either_direction() -> None:
    assert not judge_served(SERVED, [[0.0, -1.2, -2.2], [0.0, -0.5]]).passed
    gate = judge_served(SERVED, [[0.0, -0.8, -1.8], [0.0, -0.5]])
    assert not gate.passed
    assert "above what rounding makes of it" in gate.reason


def test_a_log_probability_that_is_no_number_is_caught() -> None:
    assert not judge_served(SERVED, [[0.0, float("nan"), -2.0], [0.0, -0.5]]).passed


def test_each_precision_has_its_limit_and_one_that_nobody_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "verify").mkdir()
    save_served(tmp_path, SERVED.conversations, 0.1, 0.4)
    said = [[0.0, -1.2, -2.2], [0.0, -0.7]]
    for precision, limit, passes in (("32-bit", 0.1, False), ("16-bit", 0.1, False), ("FP8", 0.4, True)):
        served = load_served(tmp_path, precision)
        assert served == Served(SERVED.conversations, limit, precision)
        gate = judge_served(served, said)
        assert (gate.passed, gate.figures["precision"]) == (passes, precision)
    assert "above what rounding to FP8 makes of it" in judge_served(served, [[0.0, -2.0, -3.0], [0.0, -1.5]]).reason
    save_served(tmp_path, SERVED.conversations, 0.1, None)
    assert load_served(tmp_path, "16-bit") == SERVED
    with pytest.raises(InvalidInput, match="was not measured when it was verified"):
        load_served(tmp_path, "FP8")
