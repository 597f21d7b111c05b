"""Connections that say nothing: the operator, the engine and who asks something are served all the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
from box import Box
from invented_box import SERVE, started

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
async def cramped(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Box]:
    """A daemon that may have 256 descriptors."""
    async with started(monkeypatch, ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *SERVE)) as box:
        yield box


async def test_silent_connections_lock_nobody_out(cramped: Box) -> None:
    key = (await cramped.client.create_key("test")).key
    status = await cramped.client.status()
    engine, endpoint = cramped.pid("engine", "old"), httpx.URL(status.endpoint)
    writers = []
    try:
        for number in range(400):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
                writer.write(b"GET /healthz HTTP/1.1\r\n" if number % 2 else b"")
                writers.append(writer)
        assert len(writers) > 200
        for _ in range(20):
            now = await cramped.client.status()
            assert now.routed == "old"
            assert [(each.state, each.restarts) for each in now.engines] == [("ready", 0)]
            await asyncio.sleep(0.1)
        assert (await cramped.client.create_key("another")).key
    finally:
        for writer in writers:
            writer.close()
    ask = {"messages": [{"role": "user", "content": "Who?"}]}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=30) as http:

        async def answers() -> bool:
            return (await http.post(f"{endpoint}/chat/completions", json=ask)).status_code == 200

        await cramped.until("an answer", answers, 60)
    assert cramped.pid("engine", "old") == engine
    assert (cramped.home.root / "daemon.log").stat().st_size < 100_000
