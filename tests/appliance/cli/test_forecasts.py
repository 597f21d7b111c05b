from __future__ import annotations

import pytest

from appliance import api
from appliance.cli.runs import print_forecasts
from appliance.words import event_line

FITS = {
    "stage": "sft",
    "memory": {"weights": 538_000_000, "logits": 134_000_000, "total": 672_000_000},
    "available": 8_000_000_000,
    "rows_at_once": 2,
    "width_at_once": 512,
    "gradient_checkpointing": False,
    "every_n_layers": 0,
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
    "every_n_layers": 2,
    "fits": False,
    "advice": "set micro_batch_size = 1",
}


def test_a_column_for_each_stage_and_advice_where_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    serving = api.Serving(needed=4_000_000_000, available=8_000_000_000, fits=True, two="room for two")
    print_forecasts(api.Forecasts(stages=(FITS, TOO_LARGE), serving=serving))
    told, advice = capsys.readouterr()
    assert [line.split() for line in told.splitlines()] == [
        ["SFT", "DPO"],
        ["weights", "538", "MB", "538", "MB"],
        ["logits", "134", "MB", "134", "MB"],
        ["memory", "672", "MB", "672", "MB"],
        ["available", "8.0", "GB", "500", "MB"],
        ["disk", "300", "MB", "300", "MB"],
        ["largest", "pass", "2", "x", "512", "tokens", "2", "x", "512", "tokens"],
        ["gradient", "checkpointing", "off", "1", "layer", "in", "2"],
        ["tokens", "1,234,567", "1,234,567"],
        ["steps", "330", "330"],
        ["time", "about", "50m", "00s", "about", "50m", "00s"],
        ["fits", "yes", "NO"],
        ["the", "release", "takes", "4.0", "GB", "of", "8.0", "GB", "to", "be", "verified", "and", "served"],
        ["for", "a", "canary,", "or", "its", "adapter", "before", "it", "is", "merged:", "room", "for", "two"],
    ]
    assert advice == "dpo does not fit: set micro_batch_size = 1\n"


def test_a_release_that_cannot_be_served_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    serving = api.Serving(needed=9_000_000_000, available=8_000_000_000, fits=False)
    print_forecasts(api.Forecasts(stages=(FITS,), serving=serving))
    assert 'set end = "adapter" to train its adapter alone' in capsys.readouterr().err
    print_forecasts(
        api.Forecasts(stages=(FITS,), serving=serving.model_copy(update={"precision": "FP8", "fits": True}))
    )
    told = capsys.readouterr().out
    assert "9.0 GB of 8.0 GB to be verified and served in FP8, because it does not fit in 16 bits" in told
    print_forecasts(api.Forecasts(stages=(FITS,), serving=None))
    assert "served" not in "".join(capsys.readouterr())


def test_the_event_as_a_line() -> None:
    assert event_line(FITS | {"event": "forecast"}) == "sft takes 330 steps, about 50m 00s, 672 MB of 8.0 GB memory"
    assert event_line(TOO_LARGE | {"event": "forecast"}).endswith(
        "memory with gradient checkpointing, which does not fit: set micro_batch_size = 1"
    )
