"""A real daemon that has no model and trains nothing."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import Shell


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """A command whose daemon runs."""
    home = Path(tempfile.mkdtemp(prefix="cli-"))
    running = Shell(home)
    daemon = running.start()
    deadline = time.monotonic() + 60
    while running.run("status").returncode:
        assert time.monotonic() < deadline, "the daemon did not start"
    yield running
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0
    shutil.rmtree(home)


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[Shell]:
    """A command without a daemon but those that a test starts."""
    alone = Shell(tmp_path / "home")
    yield alone
    alone.kill()
