"""Requests that come while one engine has left and the next is on its way."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from scripted_engine import STREAM, ScriptedEngine, chunk, events, route

from serve.gateway import edge
from serve.gateway.edge import Gateway

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
ASK_STREAM = {**ASK, "stream": True}
CHAT = "/v1/chat/completions"


async def waiting(gateway: Gateway, count: int) -> None:
    """Until so many requests wait."""
    async with asyncio.timeout(60):
        while gateway._held != count:
            await asyncio.sleep(0.01)


async def test_a_request_waits_for_the_engine_on_its_way(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine
) -> None:
    gateway.hold(True)
    gateway.route(None)
    asking = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(3)]
    await waiting(gateway, 3)
    assert (await http.get("/readyz")).status_code == 503
    assert engine.requests == []
    gateway.route(route(engine, "r2"))
    answers = await asyncio.gather(*asking)
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert [request["model"] for request in engine.requests] == ["r2", "r2", "r2"]
    assert gateway._held == 0


async def test_streams_that_have_begun_finish_on_the_old_engine(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine
) -> None:
    engine.script = events(chunk("Hel"), STREAM, pause=0.2)
    first = asyncio.create_task(http.post(CHAT, json=ASK_STREAM))
    await asyncio.wait_for(engine.arrived.wait(), 60)
    gateway.hold(True)
    gateway.route(None)
    second = asyncio.create_task(http.post(CHAT, json=ASK_STREAM))
    await waiting(gateway, 1)
    assert (await first).content == chunk("Hel") + STREAM
    gateway.route(route(engine, "r2"))
    assert (await second).status_code == 200


@pytest.mark.parametrize("end", ["deadline", "no hold"])
async def test_where_no_engine_comes_it_says_when_to_try_again(
    http: httpx.AsyncClient, gateway: Gateway, end: str
) -> None:
    gateway.hold(True)
    gateway.route(None)
    if end == "deadline":
        gateway._hold_seconds = 0.1
    asking = asyncio.create_task(http.post(CHAT, json=ASK))
    await waiting(gateway, 1)
    if end == "no hold":
        gateway.hold(False)
    answer = await asyncio.wait_for(asking, 10)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert ("still starting" if end == "deadline" else "no model is live") in answer.json()["error"]["message"]
    assert gateway._held == 0


async def test_no_more_than_a_bounded_number_wait(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "HELD_AT_MOST", 2)
    gateway.hold(True)
    gateway.route(None)
    asking = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(2)]
    await waiting(gateway, 2)
    refused = await http.post(CHAT, json=ASK)
    assert refused.status_code == 503
    assert "too many" in refused.json()["error"]["message"]
    gateway.route(route(engine))
    assert [(await answer).status_code for answer in asking] == [200, 200]


async def test_a_client_that_leaves_waits_no_longer(http: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.hold(True)
    gateway.route(None)
    with pytest.raises(httpx.ReadTimeout):
        await http.post(CHAT, json=ASK, timeout=0.3)
    await waiting(gateway, 0)


async def test_without_a_hold_nobody_waits(http: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.route(None)
    assert (await asyncio.wait_for(http.post(CHAT, json=ASK), 10)).status_code == 503


async def test_why_nothing_is_live_is_said(http: httpx.AsyncClient, gateway: Gateway, wanted: set[str]) -> None:
    gateway.route(None)
    gateway._setback = lambda: "r1 is live no longer: it is damaged"
    for still_wanted in (True, False):
        message = (await http.post(CHAT, json=ASK)).json()["error"]["message"]
        assert ("r1 is live no longer: it is damaged" in message) is not still_wanted
        wanted.clear()
