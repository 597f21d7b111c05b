"""The unit is one that systemd accepts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parent.parent / "systemd" / "appliance.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """The program's path is that of an installation, so another one stands in for it here."""
    unit = tmp_path / "appliance.service"
    unit.write_text(UNIT.read_text().replace("/opt/appliance/.venv/bin/appliance", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_the_daemon_relies_on() -> None:
    lines = UNIT.read_text().splitlines()
    for line in ("Type=notify", "KillMode=mixed", "WatchdogSec=30", "OOMPolicy=continue", "NoNewPrivileges=yes"):
        assert line in lines
    assert not any(line.startswith("MemoryDenyWriteExecute") for line in lines)
