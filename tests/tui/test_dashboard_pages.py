"""The dashboard at both sizes against a daemon on a real socket: recipes, releases, chat, data, palette, leaving."""

from __future__ import annotations

import asyncio

import pytest
from dashboard_driver import NARROW, WIDE, Driver, dashboard, narrow, wide
from fake_daemon import FakeDaemon
from invented import RECIPE
from textual.widgets import Input

from tui.widgets.row_list import RowList


async def open_page(driver: Driver, key: str, seen: str) -> None:
    await driver.press(key)
    await driver.until_seen(seen)


async def test_recipe_is_shown_confirmed_and_queued(driver: Driver) -> None:
    await open_page(driver, "2", "QLoRA SFT, then DPO")
    await driver.press("enter")
    await driver.until_seen('method = "sft"')
    await driver.press("t")
    await driver.until_seen("It waits until the runs before it have ended.")
    await driver.press("y")
    await driver.until(lambda: driver.daemon.requests == [("POST", "/v1/runs", {"recipe": RECIPE})])
    await driver.until_seen("facts-4 is queued")
    await driver.until(lambda: driver.app.current_mode == "runs" and driver.app.screen.chosen == "facts-4")
    await driver.until_seen("○ sft")


async def test_exclusive_lease_is_said_before_training(daemon: FakeDaemon) -> None:
    daemon.lease = "exclusive"
    async with dashboard(daemon, NARROW) as driver:
        await driver.until_seen("lease training")
        await open_page(driver, "2", "QLoRA SFT")
        await driver.press("t")
        await driver.until_seen("leased to one at a time: facts-2 does not")


async def test_release_shows_gates_with_figures_and_manifest(driver: Driver) -> None:
    await open_page(driver, "3", "◆ facts-2")
    assert driver.sees("5/5 gates")
    assert driver.sees("✗ facts-1")
    await driver.press("enter")
    await driver.until_seen("adapter_loss 0.4712, merged_loss 0.4719")
    assert driver.sees("fidelity was measured")
    assert driver.sees("✓ fidelity passed")
    if driver.app.size.width < 100:
        await driver.press("right_square_bracket")
    await driver.until_seen("merge_base  de-quantised")


async def test_promote_asks_and_moves_the_live_mark(driver: Driver) -> None:
    await open_page(driver, "3", "◆ facts-2")
    await driver.press("down", "down", "p")
    await driver.until_seen("Promote base-1?")
    assert driver.sees("It takes over from facts-2")
    await driver.press("y")
    await driver.until(lambda: driver.asked() == [("POST", "/v1/releases/base-1/promote")])
    await driver.until_seen("◆ base-1")
    await driver.until_seen("✓ facts-2")


async def test_what_was_done_is_seen_before_the_next_regular_look(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tui.dashboard._POLL_SECONDS", 600)
    async with dashboard(daemon, NARROW) as driver:
        await driver.until_seen("facts-3")
        await open_page(driver, "3", "◆ facts-2")
        await driver.press("down", "down", "p", "y")
        await driver.until_seen("◆ base-1")


@narrow
async def test_refused_release_cannot_be_promoted_and_says_why(driver: Driver) -> None:
    await open_page(driver, "3", "◆ facts-2")
    await driver.press("down", "p")
    await driver.until_seen("1 of 8 probes")
    await driver.press("up", "p")
    await driver.until_seen("facts-2 is live already")
    assert not driver.asked()


async def test_rollback_asks_and_moves_the_live_mark(driver: Driver) -> None:
    await open_page(driver, "3", "◆ facts-2")
    await driver.press("b")
    await driver.until_seen("Roll back?")
    await driver.press("n", "b", "y")
    await driver.until(lambda: driver.asked() == [("POST", "/v1/rollback")])
    await driver.until_seen("◆ base-1")


async def test_a_canary_is_begun_told_of_and_ended(driver: Driver) -> None:
    await open_page(driver, "3", "◆ facts-2")
    await driver.press("down", "down", "c")
    await driver.until_seen("Make base-1 the canary?")
    await driver.press("y")
    await driver.until(lambda: driver.asked() == [("POST", "/v1/releases/base-1/promote")])
    await driver.until_seen("◇ base-1")
    await driver.until_seen("◇ 10%")
    await driver.press("c")
    await driver.until_seen("base-1 is the canary; promote")
    await driver.press("b")
    await driver.until_seen("The canary base-1 ends")
    await driver.press("y")
    await driver.until_seen("✓ base-1")
    assert driver.sees("◆ facts-2")


@narrow
async def test_what_the_daemon_refuses_is_told_with_the_next_step(driver: Driver) -> None:
    await open_page(driver, "3", "◆ facts-2")
    await driver.press("down", "down", "p")
    driver.daemon.releases["base-1"]["state"] = "refused"
    await driver.press("y")
    await driver.until_seen("base-1 was refused — train again")


async def test_chat_streams_the_answer_and_sends_the_conversation(driver: Driver) -> None:
    driver.daemon.answer_pause = 0.15
    await open_page(driver, "4", "facts-2 answers")
    await driver.write("what is Veldora")
    await driver.press("enter")
    await driver.until_seen("Veldora is the capital")
    assert not driver.sees("Ostrava")
    await driver.until_seen("Veldora is the capital of Ostrava.")
    await driver.until_seen("first word after")
    driver.daemon.answer = ["[/b] yes"]
    await driver.write("really")
    await driver.press("enter")
    await driver.until_seen("[/b] yes")
    sent = driver.daemon.requests[-1][2]["messages"]
    assert [turn["role"] for turn in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"] == "Veldora is the **capital** of Ostrava."


@wide
async def test_escape_stops_an_answer_then_leaves_the_input(driver: Driver) -> None:
    driver.daemon.answer_pause = 0.3
    await open_page(driver, "4", "facts-2 answers")
    await driver.write("go on")
    await driver.press("enter")
    await driver.until_seen("Veldora")
    await driver.press("escape")
    await driver.until_seen("stopped")
    assert isinstance(driver.app.focused, Input)
    await driver.press("escape", "1")
    await driver.until_seen("facts-3")


@narrow
async def test_chat_without_a_live_release_says_what_to_do(driver: Driver) -> None:
    driver.daemon.releases.clear()
    await driver.press("ctrl+r")
    await driver.until_seen("no live release")
    await open_page(driver, "4", "promote one on page 3")
    await driver.write("hello")
    await driver.press("enter")
    await driver.until_seen("✗ no release is live")
    assert driver.sees("● connected")


async def test_dataset_report_rows_and_a_whole_row(driver: Driver) -> None:
    await open_page(driver, "5", "1,200 rows")
    await driver.press("enter")
    await driver.until_seen("line 17, reason the answer is [/empty]")
    if driver.app.size.width < 100:
        await driver.press("right_square_bracket")
    else:
        await driver.press("tab")
    await driver.until_seen("Question 0 [/foo] ␛[31mred → Answer 0")
    assert isinstance(driver.app.focused, RowList)
    await driver.press("G")
    await driver.until_seen("1200  Question 1199")
    await driver.press("up", "enter")
    await driver.until_seen("Row 1,199")
    await driver.until_seen("Answer 1198")
    assert not any("\x1b" in line for line in driver.lines())
    await driver.press("m")
    await driver.until_seen("⟦Answer 1198<|im_end|>⟧")
    assert driver.sees("Question 1198 [/foo] ␛[31mred<|im_end|>")
    assert driver.sees("41 tokens, 4 of them trained")
    assert driver.sees("cannot be trained on: it has no end of turn [/x]")
    assert not any("\x1b" in line for line in driver.lines())
    await driver.press("m")
    await driver.until(lambda: not driver.sees("⟦"))
    await driver.press("escape")
    await driver.until(lambda: not driver.sees("Row 1,199"))


async def test_empty_box_says_what_to_do(daemon: FakeDaemon, size: tuple[int, int]) -> None:
    daemon.runs.clear()
    daemon.releases.clear()
    async with dashboard(daemon, size) as driver:
        await driver.until_seen("No runs yet.")
        await driver.press("s")
        await driver.until_seen("there is no run to stop")
        await open_page(driver, "3", "No releases yet.")
        await driver.press("b")
        await driver.until_seen("nothing is live")


@narrow
async def test_palette_does_what_the_keys_do(driver: Driver) -> None:
    await driver.press("ctrl+p")
    await driver.until_seen("run: Stop")
    await driver.write("run: stop")
    await driver.until(lambda: not driver.sees("run: Resume"))
    await driver.press("enter")
    await driver.until_seen("Stop facts-3?")


@wide
async def test_palette_goes_to_records(driver: Driver) -> None:
    await driver.press("ctrl+p")
    await driver.write("release base-1")
    await driver.until_seen("go to release base-1")
    await driver.press("enter")
    await driver.until(lambda: driver.app.current_mode == "releases" and driver.app.screen.chosen == "base-1")
    await driver.until_seen("✓ verified")


@narrow
async def test_page_names_can_be_clicked(driver: Driver) -> None:
    await driver.pilot.click(offset=(30, 0))
    await driver.until_seen("◆ facts-2")
    assert driver.app.current_mode == "releases"


@pytest.mark.parametrize("key", ["q", "ctrl+q"])
async def test_quit_leaves_what_runs_running(daemon: FakeDaemon, key: str) -> None:
    async with dashboard(daemon, WIDE) as driver:
        await driver.until_seen("facts-3")
        await driver.pilot.press(key)
        await asyncio.sleep(0)
    assert driver.app.return_code == 0
    assert not daemon.requests
    assert daemon.runs["facts-3"]["state"] == "running"


@narrow
async def test_why_another_release_is_live_is_said_on_every_page(driver: Driver) -> None:
    driver.daemon.setback = "facts-3 is live no longer: it is damaged: model.safetensors is missing"
    for key in ("3", "4", "1"):
        await driver.press(key)
        await driver.until_seen("facts-3 is live no longer")
    driver.daemon.setback = ""
    await driver.until(lambda: not driver.sees("facts-3 is live no longer"))
