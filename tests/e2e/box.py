"""A whole appliance in a temporary home, as real processes that a test may kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from appliance import api
from appliance.client import Client
from appliance.errors import Unreachable
from appliance.home import Home

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


class Box:
    """`home` with a daemon, which `serve` starts, on a free port. The engine is that of APPLIANCE_ENGINE."""

    def __init__(self, home: Home, serve: tuple[str, ...] = (sys.executable, "-m", "appliance.cli", "serve")) -> None:
        self.home = home
        self._serve = serve
        self.client = Client(home.control_socket())
        self.daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "APPLIANCE_HOME": str(self.home.root), "APPLIANCE_PORT": "0"}
        with open(self.home.root / "daemon.log", "ab") as log:
            self.daemon = subprocess.Popen(
                self._serve,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_daemon(self) -> None:
        """The power of kill -9, on the daemon alone."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def pid(self, kind: str, owner: str) -> int | None:
        """Process id on record of a run's worker or a release's engine."""
        with contextlib.closing(sqlite3.connect(self.home.database)) as db:
            row = db.execute("SELECT pid FROM processes WHERE kind = ? AND owner = ?", (kind, owner)).fetchone()
        return None if row is None else int(row[0])

    def kill(self, kind: str, owner: str) -> int:
        """kill -9 on the leader only, as an out-of-memory killer would; its pid."""
        pid = self.pid(kind, owner)
        assert pid is not None, f"no {kind} of {owner}"
        os.kill(pid, signal.SIGKILL)
        return pid

    async def until(
        self, what: str, condition: Callable[[], Awaitable[Any]], seconds: float, run: str | None = None
    ) -> Any:
        """The first true value of `condition`. Fails with the log if it takes longer, or if `run` fails meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(Unreachable):
                if value := await condition():
                    return value
                if run is not None:
                    now = await self.client.run(run)
                    assert now.state not in ("failed", "stopped"), f"{now}\n{self.logs(run)}"
            await asyncio.sleep(0.1)
        raise AssertionError(f"{what} did not happen in {seconds} s\n{self.logs(run)}")

    async def until_event(self, run: str, kind: str, stage: str, seconds: float) -> dict[str, Any]:
        async def seen() -> dict[str, Any] | None:
            events = await self.client.events(run)
            return next((event for event in events if (event["event"], event["stage"]) == (kind, stage)), None)

        event: dict[str, Any] = await self.until(f"{kind} of {stage}", seen, seconds, run)
        return event

    async def until_answers(self, release: str, seconds: float = 60, run: str | None = None) -> None:
        """Wait until the endpoint's answers are those of `release`."""

        async def routed() -> bool:
            return (await self.client.status()).routed == release

        await self.until(f"{release} answering", routed, seconds, run)

    async def until_live(self, run: str, seconds: float) -> api.Release:
        """Wait until the run's release is verified, live and answering."""
        await self.until_answers(run, seconds, run)
        release = next(release for release in await self.client.releases() if release.id == run)
        assert release.live
        assert release.state == "verified"
        assert all(release.gates.values()), release.gates
        return release

    def logs(self, run: str | None) -> str:
        paths = [self.home.root / "daemon.log", *sorted(self.home.engines.glob("*.log"))]
        paths += [self.home.runs / run / "log.txt"] if run else []
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths if path.exists())


@contextlib.asynccontextmanager
async def box(model: Path) -> AsyncIterator[Box]:
    """A running box that has `model` as its base `smollm2-135m`; on leaving everything is stopped and removed."""
    root = Path(tempfile.mkdtemp(prefix="box-"))
    home = Home(root)
    home.create()
    shutil.copytree(
        model, home.models / "smollm2-135m", copy_function=os.link if _same_disk(model, root) else shutil.copy2
    )
    running = Box(home)
    running.start()
    try:
        await running.until("the daemon", running.client.status, 60)
        yield running
    finally:
        await running.client.close()
        assert running.daemon is not None
        running.daemon.send_signal(signal.SIGTERM)
        running.daemon.wait(90)
        shutil.rmtree(root)


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev
