"""kill -9 of the live release's engine while it answers, on a real daemon: nobody hangs, and it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from box import Box

from appliance import api

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Who?"}], "stream": True}
CHAT = "/chat/completions"


async def test_an_engine_that_dies_under_load(running: Box, key: str) -> None:
    behaviour = running.home.root / "old.behaviour"
    behaviour.write_text("stall")
    endpoint = (await running.client.status()).endpoint
    headers = {"authorization": f"Bearer {key}"}

    async def ready() -> int:
        return (await http.get(endpoint.removesuffix("/v1") + "/readyz")).status_code

    async def unready() -> bool:
        return await ready() == 503

    async def resting() -> api.Engine | None:
        return next(
            (each for each in (await running.client.status()).engines if each.state == "failed" and not each.pid), None
        )

    async with (
        contextlib.AsyncExitStack() as stack,
        httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=60) as http,
    ):
        streams = [await stack.enter_async_context(http.stream("POST", CHAT, json=ASK)) for _ in range(4)]
        texts = [stream.aiter_text() for stream in streams]
        for text in texts:
            assert "I " in await anext(text)
        killed = running.kill("engine", "old")
        for rest in await asyncio.gather(*(_all(text) for text in texts)):
            assert json.loads(rest.removeprefix("data: "))["error"]["code"] == "engine_died"
        behaviour.unlink()

        refused = await http.post(CHAT, json=ASK)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "engine_unavailable"
        await running.until("not ready", unready, 60)
        assert (await http.get(endpoint.removesuffix("/v1") + "/healthz")).status_code == 200
        first = await running.until("backoff", resting, 60)
        assert (first.release, first.restarts) == ("old", 1)

        await running.until_answers("old")
        assert await ready() == 200
        assert "data: [DONE]" in (await http.post(CHAT, json=ASK)).text
        assert running.kill("engine", "old") != killed
        second = await running.until("backoff again", resting, 60)
        assert second.restarts == 2


async def _all(text: Any) -> str:
    return "".join([part async for part in text])
