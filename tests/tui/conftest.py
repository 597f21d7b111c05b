from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from dashboard_driver import NARROW, WIDE, Driver, dashboard
from fake_daemon import FakeDaemon


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path short enough for a socket, where nothing listens."""
    directory = tempfile.mkdtemp(prefix="tui-")
    yield Path(directory) / "control.sock"
    shutil.rmtree(directory)


@pytest.fixture
async def daemon(socket: Path) -> AsyncIterator[FakeDaemon]:
    """A daemon that listens."""
    daemon = FakeDaemon(socket)
    await daemon.start()
    yield daemon
    await daemon.stop()


@pytest.fixture(params=[NARROW, WIDE], ids=["80x24", "120x40"])
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture
async def driver(daemon: FakeDaemon, size: tuple[int, int]) -> AsyncIterator[Driver]:
    """The dashboard with the first run in sight."""
    async with dashboard(daemon, size) as driver:
        await driver.until_seen("facts-3")
        yield driver
