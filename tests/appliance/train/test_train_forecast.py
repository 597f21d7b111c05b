from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import add_run, events, result, stage, work

from appliance.home import Home
from appliance.train import forecast
from appliance.train.events import EventLog
from appliance.train.forecast import Forecast, Work, forecast_stage
from appliance.train.recipe import Recipe, parse_recipe
from appliance.train.room import Room
from appliance.train.stage import _memory

LENGTHS = [20, 30, 40, 200] * 4


def recipe(**settings: Any) -> Recipe:
    return parse_recipe('name = "r"\nbase = "tiny"\n' + stage("sft", '"d"', **{"batch_size": 4, **settings}))


def foretold(tiny_model: Path, lengths: list[int] = LENGTHS, sequences: int = 1, **settings: Any) -> Forecast:
    chosen = recipe(**settings)
    room = Room(chosen.stages[0].micro_batch_size or 4, tokens=1024)
    return forecast_stage(tiny_model, chosen, chosen.stages[0], Work(lengths, [30, 30], sequences, room), 8)


def test_tokens_steps_and_the_largest_pass(tiny_model: Path) -> None:
    found = foretold(tiny_model)
    assert (found.steps, found.tokens) == (8, 2 * sum(LENGTHS))
    assert (found.rows_at_once, found.width_at_once) == (4, 200)
    assert foretold(tiny_model, micro_batch_size=1).rows_at_once == 1
    pairs = foretold(tiny_model, sequences=2)
    assert (pairs.rows_at_once, pairs.tokens) == (4, 2 * found.tokens), "two pairs"


def test_memory_is_the_sum_of_its_parts(tiny_model: Path) -> None:
    found = foretold(tiny_model)
    memory = found.memory
    weights = 320 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert memory.weights == 4 * weights
    assert memory.optimiser == 2 * memory.adapter == 2 * memory.gradients > 0
    assert memory.total == found.event()["memory"]["total"]
    assert found.event()["fits"] is found.fits is True
    assert found.advice == ""
    small = foretold(tiny_model, micro_batch_size=1).memory
    assert memory.activations == pytest.approx(4 * small.activations, rel=0.05)
    assert (small.weights, small.adapter, small.optimiser) == (memory.weights, memory.adapter, memory.optimiser)


@pytest.mark.parametrize(
    ("room", "advice"),
    [
        (0.9, "set micro_batch_size = 2"),
        (0.4, "set micro_batch_size = 1"),
        (0.2, "set micro_batch_size = 1, max_length = 100 and drop_long = true, which leaves out 4 of 16 rows"),
        (0.0, "take a smaller base model, or free memory"),
    ],
)
def test_what_does_not_fit_is_told_the_smallest_change(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, room: float, advice: str
) -> None:
    """With room for that share of what the largest pass holds."""
    memory = foretold(tiny_model).memory
    fixed = memory.total - memory.activations - memory.logits
    held = type("Held", (), {"available": fixed - memory.overhead + int(room * (memory.activations + memory.logits))})
    monkeypatch.setattr(forecast.psutil, "virtual_memory", held)
    monkeypatch.setattr(forecast, "_process_memory", lambda: memory.overhead)
    found = foretold(tiny_model)
    assert not found.fits
    assert found.advice == advice


def test_a_run_says_it_first_and_keeps_it_beside_the_peak(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", epochs=1))
    work(run, "sft")
    (event,) = events(run, "forecast")
    assert event["seq"] == 2, "after stage_started"
    assert event["steps"] == len(events(run, "step"))
    assert event["tokens"] == events(run, "step")[-1]["tokens"]
    figures = result(run, "sft")
    assert figures["memory_forecast"] == event["memory"]["total"]
    assert figures["memory_peak"] == max(step["memory"] for step in events(run, "step"))


def test_the_peak_kept_is_the_largest_that_a_step_said(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.append("forecast", "sft", memory={"total": 8})
    for memory in (5, 9, 7):
        log.append("step", "sft", memory=memory)
    assert _memory(log, recipe().stages[0]) == {"memory_forecast": 8, "memory_peak": 9}
