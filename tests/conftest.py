"""Shared by all tests: nothing goes online, and the real small model is fetched once for those that need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("APPLIANCE_HOME", None)

CACHE = Path(__file__).parent.parent / ".cache" / "home"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the real SmolLM2-135M-Instruct: that of APPLIANCE_TEST_MODEL, else pulled once into the cache."""
    given = os.environ.get("APPLIANCE_TEST_MODEL")
    if given:
        return Path(given)
    environment = {**os.environ, "APPLIANCE_HOME": str(CACHE), "APPLIANCE_SOCKET": "/tmp/unused.sock"}
    environment.pop("HF_HUB_OFFLINE")
    subprocess.run([sys.executable, "-m", "appliance.cli", "pull", "smollm2-135m"], env=environment, check=True)
    return CACHE / "models" / "smollm2-135m"
