"""A gateway on a real port, in front of a scripted engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from scripted_engine import KEY, OTHER_KEY, Kind, ScriptedEngine, route

from appliance.traffic import Traffic
from serve.gateway.edge import Gateway
from serve.gateway.ledger import Ledger


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[ScriptedEngine]:
    engine = ScriptedEngine(tmp_path / "engine.sock")
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def patience() -> float:
    """Seconds that the gateway waits for a silent engine."""
    return 30


@pytest.fixture
def kind() -> Kind:
    """What the engine can do."""
    return Kind()


@pytest.fixture
def traffic(tmp_path: Path) -> Iterator[Traffic]:
    traffic = Traffic(tmp_path / "traffic.db")
    traffic.start()
    yield traffic
    traffic.close()


@pytest.fixture
def ledger(traffic: Traffic) -> Ledger:
    return Ledger(traffic)


@pytest.fixture
def wanted() -> set[str]:
    """Releases that are to answer; a test may add to them."""
    return {"r1"}


@pytest.fixture
async def gateway(engine: ScriptedEngine, ledger: Ledger, wanted: set[str], patience: float, kind: Kind) -> Gateway:
    gateway = Gateway({KEY: "k1", OTHER_KEY: "k2"}.get, ledger, kind, lambda: wanted, patience)
    gateway.route(route(engine))
    return gateway


@pytest.fixture
async def listen() -> AsyncIterator[Callable[[Any], Any]]:
    """Serve an ASGI app on a free port; returns the URL."""
    running: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    async def listen(app: Any) -> str:
        listener = socket.socket(proto=socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(app, interface="asgi3", lifespan="off", log_level="warning", timeout_graceful_shutdown=0)
        )
        running.append((server, asyncio.create_task(server.serve([listener]))))
        while not server.started:
            await asyncio.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield listen
    # A shutdown by uvicorn's own rules waits for a fifth of a second.
    for server, task in running:
        task.cancel()
        for listener in server.servers:
            listener.close()
        for request in server.server_state.tasks:
            request.cancel()
    await asyncio.gather(*(task for _, task in running), return_exceptions=True)


@pytest.fixture
async def url(gateway: Gateway, listen: Callable[[Any], Any]) -> str:
    return str(await listen(gateway))


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a good key."""
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=25) as client:
        yield client
