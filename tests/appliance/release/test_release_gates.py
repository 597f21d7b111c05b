from __future__ import annotations

import json
from pathlib import Path

from appliance.release.gates import judge_parity, judge_stopping, load_probes
from appliance.supervisor.engines import Probe, ProbeAnswer

PROBES = [Probe([{"role": "user", "content": word}], [1, 2, number], 32) for number, word in enumerate("abc")]


def answers(*token_ids: list[int], finish: str = "stop") -> list[ProbeAnswer]:
    return [ProbeAnswer(ids, "text", finish, 5) for ids in token_ids]


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


def test_stopping_needs_every_answer_to_end() -> None:
    good, endless = answers([1]), answers([1], finish="length")
    assert judge_stopping(PROBES, good * 3).passed
    gate = judge_stopping(PROBES, [*good, *endless, *good])
    assert not gate.passed
    assert gate.figures == {"probes": 3, "stopped": 2, "endless": [1]}
    assert "1 of 3" in gate.reason
    assert "32 tokens" in gate.reason


def test_probes_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify" / "probes.json").write_text(json.dumps([vars(probe) for probe in PROBES]))
    assert load_probes(tmp_path) == PROBES
