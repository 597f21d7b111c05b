"""What fits where, and that the keys told are the keys there are."""

from __future__ import annotations

import pytest
from dashboard_driver import NARROW, WIDE, Driver, dashboard
from fake_daemon import FakeDaemon
from textual.binding import Binding
from textual.widget import Widget
from textual.widgets import Footer
from textual.widgets._footer import FooterKey

from tui.app import ApplianceApp
from tui.commands import key_sections
from tui.screens.help import HelpScreen
from tui.screens.page import Page

GPUS = [{"name": "NVIDIA H100 80GB HBM3", "memory_total": 80 << 30, "memory_used": 61 << 30, "utilisation": 100}] * 2
KEY_WIDGETS = (
    "Header, Tab, #link, #status, #side, #summary, Chart, Lines, TextPane, RowList, #question, Footer, FooterKey"
)
PAGES = {"1": "facts-3", "2": "QLoRA SFT", "3": "◆ facts-2", "4": "answers", "5": "1,200 rows"}


def clipped(driver: Driver) -> list[str]:
    """Widgets in sight that reach beyond the screen, or beyond what holds them, or have no room at all."""
    screen = driver.app.screen
    faulty = []
    for widget in screen.query(KEY_WIDGETS):
        if not all(node.display for node in widget.ancestors_with_self if isinstance(node, Widget)):
            continue
        region = widget.region
        if not region.area or not screen.region.contains_region(region):
            faulty.append(f"{widget!r} at {region}")
    return faulty


@pytest.mark.parametrize("key", PAGES)
async def test_nothing_reaches_beyond_the_screen(daemon: FakeDaemon, size: tuple[int, int], key: str) -> None:
    daemon.gpus = GPUS
    daemon.load = 100.0
    async with dashboard(daemon, size) as driver:
        await driver.until_seen("facts-3")
        await driver.press(key)
        await driver.until_seen(PAGES[key])
        assert not clipped(driver)
        if key != "4":
            await driver.press("enter")
            assert not clipped(driver)
            panes = len(driver.app.screen.query("#views Tab"))
            for _ in range(panes - 1):
                await driver.press("right_square_bracket")
                assert not clipped(driver)


async def test_header_fits_with_a_long_name_gpus_and_alarms(daemon: FakeDaemon, size: tuple[int, int]) -> None:
    daemon.gpus = GPUS
    daemon.load = 100.0
    daemon.releases["facts-2"]["live"] = False
    daemon._add_release("a-very-long-name-of-a-release-17", daemon.now, live=True)
    async with dashboard(daemon, size) as driver:
        await driver.until_seen("facts-3")
        line = driver.lines()[1].rstrip()
        assert "disk" in line
        assert not line.endswith("…")
        assert "cpu 100%!" in line


@pytest.mark.parametrize("key", PAGES)
async def test_footer_has_at_most_eight_hints_and_they_fit(daemon: FakeDaemon, key: str) -> None:
    async with dashboard(daemon, NARROW) as driver:
        await driver.until_seen("facts-3")
        await driver.press(key)
        await driver.until_seen(PAGES[key])
        for opened in (False, True):
            if opened and key != "4":
                await driver.press("enter")
            hints = driver.app.screen.query_one(Footer).query(FooterKey)
            assert 0 < len(hints) <= 8
            assert max(hint.region.right for hint in hints) <= NARROW[0]


async def test_narrow_shows_one_thing_and_wide_shows_all(daemon: FakeDaemon) -> None:
    async with dashboard(daemon, NARROW) as driver:
        await driver.until_seen("facts-3")
        assert not driver.sees("held out")
        await driver.press("enter")
        await driver.until_seen("Loss  Log  Events")
        assert not driver.sees("terse-1")
        assert not driver.sees("dpo step 22/40 loss")
        await driver.press("right_square_bracket")
        await driver.until_seen("dpo step 22/40 loss")
        assert not driver.sees("◆ held out")
        await driver.press("left_square_bracket")
        await driver.until_seen("◆ held out")
    async with dashboard(daemon, WIDE) as driver:
        for expected in ("terse-1", "◆ held out", "dpo step 22/40 loss", "step 20: held-out loss"):
            await driver.until_seen(expected)


def declared(app: ApplianceApp) -> set[str]:
    """Ids of the bindings that work somewhere on the present page."""
    kinds = {type(app), type(app.screen)} | {type(widget) for widget in app.screen.query("*")}
    bases = {base for kind in kinds for base in kind.__mro__ if base.__module__.startswith("tui.")}
    bindings = [binding for base in bases for binding in base.__dict__.get("BINDINGS", ())]
    assert all(isinstance(binding, Binding) and binding.id and binding.description for binding in bindings)
    ids = [binding.id for binding in bindings if isinstance(binding, Binding)]
    assert len(ids) == len(set(ids))
    return {id for id in ids if id}


@pytest.mark.parametrize("key", PAGES)
async def test_help_tells_every_key_and_no_other(daemon: FakeDaemon, key: str) -> None:
    async with dashboard(daemon, WIDE) as driver:
        await driver.press(key)
        await driver.until_seen(PAGES[key])
        app = driver.app
        page = app.screen
        assert isinstance(page, Page)
        assert {binding.id for section in key_sections(app) for _, binding in section.keys} == declared(app)
        expected = [(keys, binding) for section in key_sections(app) for keys, binding in section.keys]
        await driver.press("f1")
        assert isinstance(app.screen, HelpScreen)
        told = app.screen.text
        assert page.ABOUT in told
        for keys, binding in expected:
            assert any(line.startswith(f"  {keys}") and binding.description in line for line in told.splitlines())
        await driver.press("escape")
        assert app.screen is page


async def test_bindings_of_dialogs_have_ids_too() -> None:
    from tui.screens.confirm import Confirm
    from tui.screens.row import RowScreen

    for dialog in (Confirm, HelpScreen, RowScreen):
        assert all(isinstance(binding, Binding) and binding.id for binding in dialog.BINDINGS)
