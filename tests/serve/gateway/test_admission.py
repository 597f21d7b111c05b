"""Requests that come while one engine has left and the next is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ANSWER, STREAM, Kind, ScriptedEngine, answer, chunk, events, route, stall

from serve.gateway import admission
from serve.gateway.admission import Absence, Deployment, Route
from serve.gateway.edge import Gateway

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
ASK_STREAM = {**ASK, "stream": True}
CHAT = "/v1/chat/completions"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def waiting(gateway: Gateway, count: int) -> None:
    """Until so many requests wait."""
    await until(lambda: gateway._dispatch.live.waiting == count)


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
    assert [each.status_code for each in answers] == [200, 200, 200]
    assert [request["model"] for request in engine.requests] == ["r2", "r2", "r2"]
    assert gateway._dispatch.live.waiting == 0


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
        gateway._dispatch.live.wait_seconds = 0.1
    asking = asyncio.create_task(http.post(CHAT, json=ASK))
    await waiting(gateway, 1)
    if end == "no hold":
        gateway.hold(False)
    said = await asyncio.wait_for(asking, 10)
    assert said.status_code == 503
    assert int(said.headers["retry-after"]) > 0
    assert ("still starting" if end == "deadline" else "no model is live") in said.json()["error"]["message"]
    assert gateway._dispatch.live.waiting == 0


async def test_no_more_than_a_bounded_number_wait(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "WAITING_AT_MOST", 2)
    gateway.hold(True)
    gateway.route(None)
    asking = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(2)]
    await waiting(gateway, 2)
    refused = await http.post(CHAT, json=ASK)
    assert refused.status_code == 503
    assert "too many" in refused.json()["error"]["message"]
    gateway.route(route(engine))
    assert [(await each).status_code for each in asking] == [200, 200]


async def test_a_client_that_leaves_waits_no_longer(http: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.hold(True)
    gateway.route(None)
    with pytest.raises(httpx.ReadTimeout):
        await http.post(CHAT, json=ASK, timeout=0.3)
    await waiting(gateway, 0)


async def test_without_a_hold_nobody_waits(http: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.route(None)
    assert (await asyncio.wait_for(http.post(CHAT, json=ASK), 10)).status_code == 503


async def test_why_nobody_answers_and_when_somebody_will_is_said(http: httpx.AsyncClient, gateway: Gateway) -> None:
    async def absence() -> Absence:
        return Absence("the accelerator is taken by run r-2", 754.2)

    gateway.route(None)
    gateway._dispatch.live.absence = absence
    said = await http.post(CHAT, json=ASK)
    assert said.status_code == 503
    assert said.json()["error"]["message"] == "the accelerator is taken by run r-2"
    assert said.headers["retry-after"] == "754"


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [({"temprature": 1}, 400, "temprature"), ({"messages": None}, 400, "messages"), ({"model": "gpt"}, 404, "model")],
)
async def test_what_is_refused_is_refused_before_it_waits(
    http: httpx.AsyncClient, gateway: Gateway, held: bool, fields: dict[str, Any], status: int, param: str
) -> None:
    gateway.hold(held)
    gateway.route(None)
    said = await http.post(CHAT, json={**ASK, **fields})
    assert (said.status_code, said.json()["error"]["param"]) == (status, param)


@pytest.fixture
def kind() -> Kind:
    return Kind(at_once=2)


async def test_an_engine_gets_no_more_than_it_works_on_at_a_time_and_the_first_come_first(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine
) -> None:
    go_on, served = asyncio.Event(), answer(200, ANSWER)

    async def script(writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await served(writer)

    engine.script = script
    asking = []
    for number in range(6):
        asking.append(asyncio.create_task(http.post(CHAT, json={**ASK, "max_tokens": number + 1})))
        await until(lambda: len(engine.requests) + gateway._dispatch.live.waiting == len(asking))
    assert [request["max_tokens"] for request in engine.requests] == [1, 2]
    go_on.set()
    assert [(await answered).status_code for answered in asking] == [200] * 6
    assert sorted(request["max_tokens"] for request in engine.requests) == [1, 2, 3, 4, 5, 6]
    assert [request["max_tokens"] for request in engine.requests][2:4] in ([3, 4], [4, 3])
    assert gateway._dispatch.live.engine is not None
    assert gateway._dispatch.live.engine.answers == 0


async def test_a_request_for_many_answers_takes_as_many_places(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine
) -> None:
    engine.script = stall()
    many = asyncio.create_task(http.post(CHAT, json={**ASK, "n": 100}))
    await until(lambda: len(engine.requests) == 1)
    other = asyncio.create_task(http.post(CHAT, json=ASK))
    await waiting(gateway, 1)
    many.cancel()
    await until(lambda: len(engine.requests) == 2)
    other.cancel()
    await until(lambda: gateway._dispatch.live.engine is not None and gateway._dispatch.live.engine.answers == 0)


@pytest.mark.parametrize("leaves", ["asked", "waiting"])
async def test_whoever_leaves_leaves_no_place_taken(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine, leaves: str
) -> None:
    engine.script = stall()
    first = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(2)]
    await until(lambda: len(engine.requests) == 2)
    second = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(2)]
    await waiting(gateway, 2)
    for task in first if leaves == "asked" else second:
        task.cancel()
    await until(lambda: gateway._dispatch.live.waiting == 0)
    await until(lambda: len(engine.requests) == (4 if leaves == "asked" else 2))
    assert gateway._dispatch.live.engine is not None
    assert gateway._dispatch.live.engine.answers == 2
    for task in (*first, *second):
        task.cancel()
    await until(lambda: gateway._dispatch.live.engine is not None and gateway._dispatch.live.engine.answers == 0)


async def test_where_no_place_comes_free_it_says_that_the_model_is_busy(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine
) -> None:
    engine.script = stall()
    gateway._dispatch.live.wait_seconds = 0.1
    asking = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(2)]
    await until(lambda: len(engine.requests) == 2)
    refused = await http.post(CHAT, json=ASK)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert "busy" in refused.json()["error"]["message"]
    for task in asking:
        task.cancel()
    await until(lambda: gateway._dispatch.live.engine is not None and gateway._dispatch.live.engine.answers == 0)


async def test_a_place_at_an_engine_that_has_left_meanwhile_is_none(tmp_path: Path) -> None:
    """Between its turn and its first step nobody could wait for its answer to end."""
    deployment = Deployment("live", 1, 5)
    deployment.hold(True)
    entered: list[str] = []

    async def enter() -> None:
        async with deployment.place(1) as engine:
            entered.append(engine.route.model)

    asking = asyncio.create_task(enter())
    await until(lambda: deployment.waiting == 1)
    deployment.route(Route("unix:/old", "old"))
    deployment.route(None)
    await asyncio.sleep(0.05)
    assert entered == []
    deployment.route(Route("unix:/new", "new"))
    await asyncio.wait_for(asking, 10)
    assert entered == ["new"]


async def test_whoever_leaves_in_the_moment_of_its_turn_leaves_no_place_taken() -> None:
    deployment = Deployment("live", 1, 5)
    deployment.hold(True)

    async def enter() -> None:
        async with deployment.place(1):
            pass

    asking = asyncio.create_task(enter())
    await until(lambda: deployment.waiting == 1)
    deployment.route(Route("unix:/new", "new"))
    asking.cancel()
    await asyncio.wait([asking])
    assert deployment.engine is not None
    assert (deployment.engine.answers, deployment.waiting) == (0, 0)
