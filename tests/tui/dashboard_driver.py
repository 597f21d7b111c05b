"""A person at the dashboard, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fake_daemon import FakeDaemon
from textual.pilot import Pilot

from appliance.client import Client
from tui.app import ApplianceApp

NARROW, WIDE = (80, 24), (120, 40)
# For what does not depend on the layout.
narrow = pytest.mark.parametrize("size", [NARROW], indirect=True, ids=["80x24"])
wide = pytest.mark.parametrize("size", [WIDE], indirect=True, ids=["120x40"])


class Driver:
    """A person at the dashboard: presses keys, and waits until something is to be seen."""

    def __init__(self, app: ApplianceApp, pilot: Pilot[None], daemon: FakeDaemon) -> None:
        self.app, self.pilot, self.daemon = app, pilot, daemon

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.pilot.press(key)
            await self.pilot.pause()

    async def write(self, text: str) -> None:
        await self.pilot.press(*["space" if character == " " else character for character in text])

    def lines(self) -> list[str]:
        """What is on the screen, a string a row."""
        return [strip.text for strip in self.app.screen._compositor.render_strips()]

    def sees(self, text: str) -> bool:
        return any(text in line for line in self.lines())

    async def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        """Wait for a condition; show the screen where it does not come."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError("it did not come; the screen was:\n" + "\n".join(self.lines()))
            await asyncio.sleep(0.02)
            await self.pilot.pause()

    async def until_seen(self, text: str, seconds: float = 60.0) -> None:
        await self.until(lambda: self.sees(text), seconds)

    def asked(self) -> list[tuple[str, str]]:
        """What the daemon was told to do."""
        return [(method, path) for method, path, _ in self.daemon.requests]


@contextlib.asynccontextmanager
async def dashboard(daemon: FakeDaemon, size: tuple[int, int]) -> AsyncIterator[Driver]:
    """The dashboard of `daemon` in a terminal of `size`."""
    app = ApplianceApp(Client(daemon.socket))
    app.animation_level = "none"
    async with app.run_test(size=size, notifications=True) as pilot:
        yield Driver(app, pilot, daemon)
