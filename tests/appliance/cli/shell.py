"""The `appliance` command as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class Shell:
    """Runs `appliance` with this home, and these variables."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self._environment = environment
        self._started: list[subprocess.Popen[str]] = []

    @property
    def environment(self) -> dict[str, str]:
        ours = {"APPLIANCE_HOME": str(self.home), "APPLIANCE_ENGINE": "transformers"}
        return {**os.environ, **ours, **self._environment}

    def run(self, *arguments: str, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "appliance.cli", *arguments],
            env={**self.environment, **environment},
            input=input,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def refuses(self, code: int, *arguments: str, **environment: str) -> str:
        """The one line that the command says when it cannot do it; checks the exit code."""
        done = self.run(*arguments, **environment)
        assert done.returncode == code, (done.stdout, done.stderr)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("appliance: error: ")
        assert " — " in lines[0]
        return lines[0]

    def start(self, **environment: str) -> subprocess.Popen[str]:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "appliance.cli", "serve"],
            env={**self.environment, "APPLIANCE_PORT": "0", **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(daemon)
        return daemon

    def kill(self) -> None:
        """End what a test that failed has left running."""
        for daemon in self._started:
            daemon.kill()
            daemon.wait()
