"""A real engine process, and a gateway on a real port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from appliance.data.tokenizer import TemplateSettings
from appliance.settings import Settings
from appliance.supervisor.engines import EngineKind
from serve.engines.choose import choose_engine
from serve.gateway.edge import Gateway

KEY = "sk-good"


@dataclass(frozen=True)
class Served:
    """An engine process that is ready."""

    kind: EngineKind
    process: subprocess.Popen[bytes]
    address: str
    socket: Path
    model: Path
    log: Path
    name: str = "r1"


@contextmanager
def serving(
    settings: Settings, model: Path, directory: Path, template: TemplateSettings | None = None
) -> Iterator[Served]:
    """Start the engine that `settings` choose, wait until it is ready, and end its whole process group afterwards."""
    kind = choose_engine(settings)
    path = directory / "engine.sock"
    # What a killed engine leaves behind.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    command = kind.command(model, "r1", path, template)
    log = directory / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + kind.ready_seconds
        while not asyncio.run(kind.ready(command.address)):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield Served(kind, process, command.address, path, model, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@asynccontextmanager
async def listening(gateway: Gateway) -> AsyncIterator[str]:
    """The gateway on a free port; yields its URL."""
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(gateway, lifespan="off", log_level="warning", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    await task
