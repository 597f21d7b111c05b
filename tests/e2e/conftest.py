"""A real daemon with engines that invent their answers."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from box import Box

from appliance.home import Home
from appliance.store.database import open_database
from appliance.store.releases import Releases

SERVE = (sys.executable, str(Path(__file__).parent / "invented_daemon.py"))


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Box]:
    """A daemon with the releases old, which answers, and new."""
    monkeypatch.setenv("APPLIANCE_CANARY_REQUESTS", "40")
    monkeypatch.setenv("APPLIANCE_LEASE", "share")
    home = Home(Path(tempfile.mkdtemp(prefix="box-")))
    home.create()
    with contextlib.closing(open_database(home.database)) as db:
        for id in ("old", "new"):
            (home.releases / id).mkdir()
            Releases(db).add(id, "tiny", "verified", "", {}, promote=id == "old")
    box = Box(home, SERVE)
    box.start()
    try:
        await box.until_answers("old")
        yield box
    finally:
        await box.client.close()
        assert box.daemon is not None
        box.daemon.send_signal(signal.SIGTERM)
        box.daemon.wait(60)
        shutil.rmtree(home.root)


@pytest.fixture
async def key(running: Box) -> str:
    return (await running.client.create_key("test")).key
