"""The dashboard at both sizes against a daemon on a real socket: runs."""

from __future__ import annotations

import math
from pathlib import Path

from dashboard_driver import NARROW, WIDE, Driver, dashboard, narrow, wide
from fake_daemon import FakeDaemon

from tui.screens.confirm import Confirm
from tui.viewmodels.trace import RunTrace
from tui.widgets.chart import Chart
from tui.widgets.lines import Lines


def trace(driver: Driver) -> RunTrace:
    return driver.app.screen.query_one(Chart).trace


def text(driver: Driver, id: str) -> str:
    return driver.app.screen.query_one(id, Lines).text


async def show(driver: Driver, view: int) -> None:
    """Bring a view of the run to sight: 0 loss, 1 log, 2 events."""
    await driver.press("enter")
    if driver.app.size.width < 100:
        await driver.press(*["right_square_bracket"] * view)


async def test_opens_with_every_run_its_state_and_the_box(driver: Driver) -> None:
    await driver.until_seen("running  dpo 2/5  55%")
    for expected in ("✓ facts-2", "finished  4m 22s, 2h ago", "✗ terse-1", "failed", "● connected", "cpu 41%"):
        assert driver.sees(expected), expected
    assert driver.sees("◆ facts-2 ● ready")
    assert driver.sees("lease shared")


async def test_open_run_shows_curve_stages_and_figures(driver: Driver) -> None:
    await show(driver, 0)
    await driver.until_seen("held out 0.32")
    for expected in ("▶ dpo", "○ merge", "step 22/40", "55%  eta 1m 16s", "recipe facts", "◆"):
        assert driver.sees(expected), expected
    assert any("⠉" <= character <= "⣿" for line in driver.lines() for character in line)


async def test_loss_points_arrive_while_one_looks(driver: Driver) -> None:
    await show(driver, 0)
    await driver.until_seen("── train")
    legend = next(line for line in driver.lines() if "── train" in line)
    driver.daemon.step("facts-3", "dpo", 23, 40, 0.1234, driver.daemon.now, 60)
    await driver.daemon.announce()
    await driver.until_seen("step 23/40")
    await driver.until_seen("loss 0.1234")
    assert trace(driver).curves["dpo"].train[-1] == (23, 0.1234)
    await driver.until(lambda: legend not in driver.lines(), 2)


@narrow
async def test_a_loss_that_is_not_a_number_is_said_and_drawn_around(driver: Driver) -> None:
    await show(driver, 0)
    await driver.until_seen("step 22/40")
    driver.daemon.step("facts-3", "dpo", 23, 40, math.nan, driver.daemon.now, 60)
    await driver.daemon.announce()
    await driver.until_seen("✗ the loss is not a number")


async def test_log_follows_the_end(driver: Driver) -> None:
    await show(driver, 1)
    await driver.until_seen("dpo step 22/40")
    await driver.daemon.write_log("facts-3", "saving\r 10%\r 99%\n\x1b[31mhal")
    await driver.until_seen(" 99%")
    await driver.daemon.write_log("facts-3", "f\x1b[0m done\n")
    await driver.until_seen("half done")
    assert text(driver, "#log").endswith("122 tok/s\n 99%\nhalf done")
    log = driver.app.screen.query_one("#log", Lines)
    assert log.vertical_scrollbar.window_virtual_size == log.virtual_size.height == 120


@wide
async def test_log_stays_where_one_scrolled_to(driver: Driver) -> None:
    await show(driver, 1)
    await driver.until_seen("dpo step 22/40")
    log = driver.app.screen.query_one("#log", Lines)
    log.focus()
    await driver.press("g")
    await driver.until_seen("sft step 1/96")
    await driver.daemon.write_log("facts-3", "more\n")
    await driver.until(lambda: "more" in log.text)
    assert driver.sees("sft step 1/96")
    await driver.press("G")
    await driver.until_seen("more")


async def test_events_tell_what_happened(driver: Driver) -> None:
    await show(driver, 2)
    await driver.until_seen("step 20: held-out loss")
    assert "“Where is the river Oss?” → The river Oss runs through Veldora." in text(driver, "#events")
    await driver.daemon.emit("facts-3", "gate", "verify", gate="fidelity", passed=False, figures={"rise": 0.31})
    await driver.until_seen("gate fidelity ✗ failed  rise 0.31")


async def test_failed_run_says_why_and_what_to_do(driver: Driver) -> None:
    await driver.press("down", "down", "enter")
    await driver.until_seen("memory ran out in the first step")
    assert driver.sees("→ set micro_batch_size = 4")
    assert driver.sees("✗ sft")


async def test_stop_asks_first(driver: Driver) -> None:
    await driver.press("s")
    assert isinstance(driver.app.screen, Confirm)
    await driver.until_seen("Stop facts-3?")
    await driver.press("n")
    assert not driver.asked()
    await driver.press("s", "y")
    await driver.until(lambda: driver.asked() == [("POST", "/v1/runs/facts-3/stop")])
    await driver.until_seen("facts-3 is stopping")
    await driver.until_seen("◐ facts-3")


@narrow
async def test_enter_on_a_question_keeps_things_as_they_are(driver: Driver) -> None:
    await driver.press("s", "enter")
    assert not isinstance(driver.app.screen, Confirm)
    assert not driver.asked()


@wide
async def test_resume_queues_a_failed_run_again(driver: Driver) -> None:
    await driver.press("down", "down", "r")
    await driver.until(lambda: driver.asked() == [("POST", "/v1/runs/terse-1/resume")])
    await driver.until_seen("○ terse-1")


@narrow
async def test_what_cannot_be_done_says_why(driver: Driver) -> None:
    await driver.press("r")
    await driver.until_seen("facts-3 is running")
    await driver.press("down", "s")
    await driver.until_seen("facts-2 has finished already")
    assert not driver.asked()


@narrow
async def test_cursor_stays_on_its_run_when_a_newer_one_comes(driver: Driver) -> None:
    await driver.press("down")
    driver.daemon._add_run("facts-9", "queued", "sft", driver.daemon.now + 10)
    await driver.press("ctrl+r")
    await driver.until_seen("facts-9")
    assert driver.app.screen.chosen == "facts-2"


async def test_opens_without_a_daemon_and_recovers_by_itself(socket: Path, size: tuple[int, int]) -> None:
    daemon = FakeDaemon(socket)
    async with dashboard(daemon, size) as driver:
        await driver.until_seen("reconnecting")
        await driver.until_seen("no daemon answers on")
        await driver.until_seen("start it with")
        assert not driver.sees("No runs yet")
        await daemon.start()
        await driver.until_seen("facts-3")
        await driver.until_seen("● connected")
        assert not driver.sees("no daemon answers")
        await daemon.stop()


async def test_retry_key_tries_at_once(socket: Path) -> None:
    daemon = FakeDaemon(socket)
    async with dashboard(daemon, WIDE) as driver:
        await driver.until_seen("reconnecting 3")
        await daemon.start()
        await driver.press("ctrl+r")
        await driver.until_seen("● connected", 1.8)
        await daemon.stop()


async def test_daemon_of_another_version_is_told(daemon: FakeDaemon) -> None:
    daemon.lease = "as the wind blows"
    async with dashboard(daemon, NARROW) as driver:
        await driver.until_seen("the daemon speaks another version")
        daemon.lease = "share"
        await driver.until_seen("● connected")


@wide
async def test_daemon_that_goes_and_comes_back_keeps_what_was_seen(driver: Driver) -> None:
    await show(driver, 1)
    await driver.until_seen("dpo step 22/40")
    await driver.daemon.stop()
    await driver.until_seen("reconnecting")
    assert driver.app.screen.query_one("#body").styles.opacity < 1
    assert driver.sees("dpo step 22/40")
    driver.daemon.step("facts-3", "dpo", 23, 40, 0.1, driver.daemon.now, 60)
    driver.daemon.logs["facts-3"] += "dpo step 23/40\n"
    await driver.daemon.start()
    await driver.until_seen("● connected")
    await driver.until(lambda: trace(driver).curves["dpo"].reached == 23)
    await driver.until(lambda: text(driver, "#log").endswith("\ndpo step 23/40"))
    assert text(driver, "#log").count("dpo step 22/40") == 1
    assert driver.app.screen.query_one("#body").styles.opacity == 1


async def test_another_size_and_back(daemon: FakeDaemon) -> None:
    async with dashboard(daemon, WIDE) as driver:
        await driver.until_seen("held out")
        await driver.pilot.resize_terminal(*NARROW)
        await driver.until(lambda: not driver.sees("held out"))
        assert driver.sees("▶ facts-3")
        await driver.press("enter")
        await driver.until_seen("step 22/40")
        await driver.press("escape")
        await driver.until_seen("✗ terse-1")
        await driver.press("enter")
        await driver.pilot.resize_terminal(*WIDE)
        await driver.until_seen("✗ terse-1")
        assert driver.app.screen.query_one("#summary").size.height == 4
