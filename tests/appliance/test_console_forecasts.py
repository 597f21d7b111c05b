from __future__ import annotations

import pytest

from appliance.console import event_line, print_forecasts

FITS = {
    "stage": "sft",
    "memory": {"weights": 538_000_000, "logits": 134_000_000, "total": 672_000_000},
    "available": 8_000_000_000,
    "rows_at_once": 2,
    "width_at_once": 512,
    "gradient_checkpointing": False,
    "disk": 300_000_000,
    "tokens": 1_234_567,
    "steps": 330,
    "seconds": 3000,
    "fits": True,
    "advice": "",
}
TOO_LARGE = FITS | {
    "stage": "dpo",
    "available": 500_000_000,
    "gradient_checkpointing": True,
    "fits": False,
    "advice": "set micro_batch_size = 1",
}


def test_a_column_for_each_stage_and_advice_where_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    print_forecasts([FITS, TOO_LARGE])
    told, advice = capsys.readouterr()
    assert [line.split() for line in told.splitlines()] == [
        ["SFT", "DPO"],
        ["weights", "538.0", "MB", "538.0", "MB"],
        ["logits", "134.0", "MB", "134.0", "MB"],
        ["memory", "672.0", "MB", "672.0", "MB"],
        ["available", "8.0", "GB", "500.0", "MB"],
        ["disk", "300.0", "MB", "300.0", "MB"],
        ["largest", "pass", "2", "x", "512", "tokens", "2", "x", "512", "tokens"],
        ["gradient", "checkpointing", "off", "on"],
        ["tokens", "1,234,567", "1,234,567"],
        ["steps", "330", "330"],
        ["time", "about", "50", "min", "about", "50", "min"],
        ["fits", "yes", "NO"],
    ]
    assert advice == "dpo does not fit: set micro_batch_size = 1\n"


def test_the_event_as_a_line() -> None:
    assert event_line(FITS | {"event": "forecast"}) == "sft takes 330 steps, about 50 min, 672.0 MB of 8.0 GB memory"
    assert event_line(TOO_LARGE | {"event": "forecast"}).endswith(
        "memory with gradient checkpointing, which does not fit: set micro_batch_size = 1"
    )
