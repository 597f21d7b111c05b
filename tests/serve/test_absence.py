"""Why nobody answers, and when somebody will again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from controlling import Control

from appliance.train.events import EventLog
from serve.absence import Absences
from serve.gateway.admission import NOTHING_LIVE, Absence


def absences(control: Control, exclusive: bool = True) -> Absences:
    return Absences(control.home, control.supervisor.releases, control.supervisor.runs, exclusive)


@pytest.fixture
def live(control: Control) -> None:
    control.supervisor.releases.add("old", "tiny", "verified", "", {}, promote=True)


def working(control: Control) -> str:
    run = control.run("queued")
    control.supervisor.runs.mark_running(run)
    control.supervisor.runs.advance(run, "sft")
    return run


def step(control: Control, run: str, eta_seconds: float, stage: str = "sft") -> None:
    log = EventLog(Path(control.home.runs / run / "events.jsonl"))
    log.append("step", stage, step=1, steps=9, eta_seconds=eta_seconds)


async def test_where_nothing_was_promoted_it_says_what_to_do(control: Control) -> None:
    assert await absences(control).now() == NOTHING_LIVE


async def test_what_went_wrong_with_the_live_release_is_said(control: Control, live: None) -> None:
    control.supervisor.releases.give_way(None, "it is damaged: bits")
    assert "old did not go live: it is damaged: bits" in (await absences(control).now()).reason


async def test_an_engine_that_is_not_ready_is_no_missing_model(control: Control, live: None) -> None:
    working(control)
    assert "the engine of the live model old is not ready" in (await absences(control, exclusive=False).now()).reason


async def test_while_a_worker_has_the_accelerator_that_is_said_and_for_how_long(control: Control, live: None) -> None:
    run = working(control)
    expected = f"the accelerator is taken by run {run}, at sft; old answers again after it"
    assert await absences(control).now() == Absence(expected)
    step(control, run, 754.0)
    absence = await absences(control).now()
    assert absence.reason == f"{expected}, in 13 min at the earliest"
    assert absence.seconds == pytest.approx(754, abs=30)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
async def test_a_time_that_has_passed_or_of_another_stage_promises_nothing(
    control: Control, live: None, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = working(control)
    step(control, run, 60.0, stage)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert (await absences(control).now()).seconds is None
