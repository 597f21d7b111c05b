"""The terminal goes in which the daemon was started: it ends as by SIGTERM, and leaves no engine with the memory."""

from __future__ import annotations

import signal

import psutil
import pytest
from box import Box

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_a_hangup_ends_the_daemon_and_its_engines(running: Box) -> None:
    engine, daemon = running.pid("engine", "old"), running.daemon
    assert engine
    assert daemon
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait(60) == 0
    assert not psutil.pid_exists(engine)
    assert running.pid("engine", "old") is None
