"""An engine that could not be asked has not failed to answer."""

from __future__ import annotations

import asyncio
import errno

import pytest
from mortal_daemon import Daemon

from appliance.supervisor import engine_processes


@pytest.mark.parametrize("asked", [False, True])
async def test_an_engine_that_could_not_be_asked_is_not_taken_for_hung(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    run = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    monkeypatch.setattr(engine_processes, "HUNG_SECONDS", 0.3)
    looks = 0

    async def ready(address: str) -> bool:
        nonlocal looks
        looks += 1
        if asked:
            return False
        raise OSError(errno.EMFILE, "too many open files")

    daemon.engine.ready = ready  # type: ignore[method-assign]
    if asked:
        await daemon.until(lambda: daemon.supervisor.engines.failures.get(run))
    else:
        await asyncio.sleep(0.6)
        await daemon.until(lambda: looks > 5)
        assert not daemon.supervisor.engines.failures
        assert daemon.supervisor.routed == run
