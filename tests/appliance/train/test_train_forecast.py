from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import add_run, events, result, stage, work

from appliance.home import Home
from appliance.train import forecast
from appliance.train.events import EventLog
from appliance.train.forecast import MARGIN, Forecast, Size, Work, forecast_stage
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.recipe import Recipe, parse_recipe
from appliance.train.stage import _memory

LENGTHS = [20, 30, 40, 200] * 4


@pytest.fixture(autouse=True)
def no_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the C library's share of a model of two layers is more than checkpointing saves."""
    monkeypatch.setattr(forecast, "SLACK", 1.0)
    monkeypatch.setattr(forecast, "SLACK_TWICE", 1.0)


def recipe(**settings: Any) -> Recipe:
    return parse_recipe('name = "r"\nbase = "tiny"\n' + stage("sft", '"d"', **{"batch_size": 4, **settings}))


def foretold(
    tiny_model: Path,
    *,
    sequences: int = 1,
    compared: int = 0,
    trained: float = 0.5,
    tokens: int = 1024,
    settled: bool = False,
    **settings: Any,
) -> Forecast:
    """For rows of LENGTHS of which that share is trained."""
    chosen = recipe(**settings)
    rows_at_most = chosen.stages[0].micro_batch_size or chosen.stages[0].batch_size
    limit = MicroBatchLimit(rows_at_most, tokens=tokens, settled=settled)
    rows, held_out = ([Size(length, round(trained * length)) for length in some] for some in (LENGTHS, [30, 30]))
    return forecast_stage(tiny_model, chosen, chosen.stages[0], Work(rows, held_out, sequences, compared, limit), 8)


def give(monkeypatch: pytest.MonkeyPatch, available: int, overhead: int = 0) -> None:
    """Let the box hold so much, of which this process holds `overhead`; it computes a million operations a second."""
    held = type("Held", (), {"available": available - overhead})
    monkeypatch.setattr(forecast.psutil, "virtual_memory", held)
    monkeypatch.setattr(forecast, "_process_memory", lambda: overhead)
    monkeypatch.setattr(forecast, "training_speed", lambda: 1e6)


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
    ("room", "settings", "advice"),
    [
        (0.9, {}, "set micro_batch_size = 2"),
        (0.4, {}, "set micro_batch_size = 1"),
        (0.23, {}, 'set micro_batch_size = 1 and gradient_checkpointing = "on"'),
        (
            0.1,
            {},
            'set micro_batch_size = 1, gradient_checkpointing = "on", max_length = 100 and drop_long = true, '
            "which leaves out 4 of 16 rows",
        ),
        (0.0, {}, "take a smaller base model, or free memory"),
        (0.23, {"micro_batch_size": 1}, 'set gradient_checkpointing = "on"'),
        (0.1, {"micro_batch_size": 1, "gradient_checkpointing": "auto"}, "set max_length = 100 and drop_long = true, "),
        (0.4, {"gradient_checkpointing": "on"}, "set micro_batch_size = 2"),
    ],
)
def test_what_does_not_fit_is_told_the_smallest_change(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, room: float, settings: dict[str, Any], advice: str
) -> None:
    """With room for that share of what the largest pass holds without checkpointing."""
    memory = foretold(tiny_model, gradient_checkpointing="off").memory
    fixed = memory.total - memory.activations - memory.logits
    give(monkeypatch, fixed + int(room * (memory.activations + memory.logits)), memory.overhead)
    found = foretold(tiny_model, **{"gradient_checkpointing": "off", **settings})
    assert not found.fits
    assert found.advice.startswith(advice)


def test_checkpointing_is_chosen_where_the_forecast_has_no_room_without(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, 1 << 40)
    usual, less = (foretold(tiny_model, gradient_checkpointing=word) for word in ("off", "on"))
    assert (usual.every_n_layers, less.every_n_layers) == (0, 1)
    assert less.memory.activations < 0.8 * usual.memory.activations
    assert 1.2 * usual.seconds < less.seconds < 1.6 * usual.seconds
    assert foretold(tiny_model) == usual
    give(monkeypatch, int(MARGIN * usual.memory.total) - 1)
    assert foretold(tiny_model).every_n_layers == 1
    assert foretold(tiny_model).event()["gradient_checkpointing"] is True
    assert foretold(tiny_model, gradient_checkpointing="off").every_n_layers == 0


def test_no_more_layers_are_computed_twice_than_there_has_to_be(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "CHECKPOINTED", (2, 1))
    give(monkeypatch, 1 << 40)
    none, every = (foretold(tiny_model, gradient_checkpointing=word) for word in ("off", "on"))
    give(monkeypatch, int(MARGIN * none.memory.total) - 1)
    second = foretold(tiny_model)
    assert second.every_n_layers == 2
    assert every.memory.total < second.memory.total < none.memory.total
    assert none.seconds < second.seconds < every.seconds
    give(monkeypatch, int(MARGIN * second.memory.total) - 1)
    assert foretold(tiny_model).every_n_layers == 1


def test_smaller_passes_come_before_layers_that_are_computed_twice(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "SMALLER_PASSES", (400,))
    give(monkeypatch, 1 << 40)
    usual, smaller = (foretold(tiny_model, tokens=tokens) for tokens in (800, 400))
    give(monkeypatch, int(MARGIN * usual.memory.total) - 1)
    found = foretold(tiny_model, tokens=800)
    assert (found.every_n_layers, found.micro_batch_tokens, found.rows_at_once) == (0, 400, 2)
    give(monkeypatch, int(MARGIN * smaller.memory.total) - 1)
    assert foretold(tiny_model, tokens=800).every_n_layers == 1


def test_passes_are_as_large_as_there_is_room_for(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "LARGER_PASSES", (800, 3200))
    wide = {"batch_size": 16, "gradient_checkpointing": "auto"}
    give(monkeypatch, 1 << 40)
    large = foretold(tiny_model, tokens=400, **wide)
    assert (large.micro_batch_tokens, large.rows_at_once * large.width_at_once) == (3200, 16 * 200)
    usual = foretold(tiny_model, tokens=400, settled=True, **wide)
    assert (usual.micro_batch_tokens, usual.rows_at_once) == (400, 2), "the memory was too little before"
    give(monkeypatch, int(MARGIN * large.memory.total) - 1)
    assert foretold(tiny_model, tokens=400, **wide).micro_batch_tokens == 800
    give(monkeypatch, int(MARGIN * usual.memory.total))
    assert foretold(tiny_model, tokens=400, **wide).micro_batch_tokens == 400
    give(monkeypatch, 1 << 40)
    assert foretold(tiny_model, tokens=400, **{**wide, "batch_size": 2}).micro_batch_tokens == 400, "two rows are all"


def test_checkpointing_that_saves_nothing_is_not_chosen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 1 << 20)
    assert foretold(tiny_model).every_n_layers == 1
    monkeypatch.setattr(forecast, "SLACK_TWICE", 4.0)
    assert foretold(tiny_model).every_n_layers == 0


def test_only_trained_tokens_meet_the_vocabulary(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 1 << 40)
    few, many = (foretold(tiny_model, trained=share) for share in (0.05, 1.0))
    assert few.memory.logits < many.memory.logits / 2
    assert few.memory.activations == many.memory.activations
    assert few.seconds < many.seconds


def test_sequences_that_are_compared_take_time_and_no_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 1 << 40)
    alone, compared = (foretold(tiny_model, compared=count) for count in (0, 1))
    assert alone.memory == compared.memory
    assert 1.2 * alone.seconds < compared.seconds < 1.6 * alone.seconds


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
    assert _memory(log.read()) == {"memory_forecast": 8, "memory_peak": 9}


@pytest.mark.parametrize(
    ("on_gpu", "fast", "share", "size"),
    [(False, False, 0.36, 2048), (False, True, 0.22, 2048), (True, False, 0.4, 4096)],
)
def test_time_is_told_by_products_as_the_steps_have_them(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, fast: bool, share: float, size: int
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(forecast, "ON_GPU", on_gpu)
    monkeypatch.setattr(forecast.products, "are_fast", lambda: fast)
    monkeypatch.setattr(forecast, "matmul_speed", lambda size: sizes.append(size) or 1e9)
    assert forecast.training_speed() == share * 1e9
    assert sizes == [size]


def test_frozen_layers_in_bf16_are_measured_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes, **named: made.append(named["dtype"]) or randn(*sizes, **named))
    for fast, size in ((False, 16), (True, 17)):  # what was measured once is known
        monkeypatch.setattr(forecast.products, "are_fast", lambda fast=fast: fast)
        assert forecast.matmul_speed(size) > 0
    assert made == [torch.float32, torch.bfloat16]
