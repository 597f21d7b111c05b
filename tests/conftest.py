"""Shared by all tests: nothing goes online, the real small model is fetched once, and what is costly is made once."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("APPLIANCE_HOME", None)

CACHE = Path(__file__).parent.parent / ".cache" / "home"
COSTLY = ("trained", "served", "shell")
"""Session fixtures that take longer than the tests that ask for them."""

# What ignores a hangup, as under nohup, has children that do.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No test asserts times.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")

# Importing makes half a million objects that stay. A collection would go through them again and again.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several workers share the tests, those with a costly fixture all go to the same one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        for name in COSTLY:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the real SmolLM2-135M-Instruct: that of APPLIANCE_TEST_MODEL, else pulled once into the cache."""
    given = os.environ.get("APPLIANCE_TEST_MODEL")
    if given:
        return Path(given)
    environment = {**os.environ, "APPLIANCE_HOME": str(CACHE), "APPLIANCE_SOCKET": "/tmp/unused.sock"}
    environment.pop("HF_HUB_OFFLINE")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "pull.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "-m", "appliance.cli", "pull", "smollm2-135m"], env=environment, check=True)
    return CACHE / "models" / "smollm2-135m"
