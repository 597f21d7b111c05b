from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mortal_daemon import Daemon

from appliance.home import Home
from appliance.supervisor import supervisor as loop


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr(loop, "TICK_SECONDS", 0.02)
    home = Home(tmp_path)
    home.create()
    running = Daemon(home)
    yield running
    await running.die()
    await running.supervisor.close(grace=5)
