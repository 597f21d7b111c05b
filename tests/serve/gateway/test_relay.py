"""Engines that refuse, stall, die and stutter; clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from scripted_engine import (
    ANSWER,
    OVERFLOW_OF_VLLM,
    STREAM,
    Kind,
    Script,
    ScriptedEngine,
    answer,
    broken_answer,
    chunk,
    events,
    route,
    stall,
)

from serve.gateway.edge import Gateway

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
ASK_STREAM = {**ASK, "stream": True}
CHAT = "/v1/chat/completions"


def frames(text: str) -> list[Any]:
    """The data of each event; fails where one is cut."""
    assert text.endswith("\n\n")
    data = [frame.removeprefix("data: ") for frame in text.removesuffix("\n\n").split("\n\n")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


async def test_a_stream_comes_through_byte_for_byte(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = events(STREAM)
    response = await http.post(CHAT, json=ASK_STREAM)
    assert response.content == STREAM
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache, no-transform"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_stream_in_single_bytes_comes_through(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = events(*(bytes([byte]) for byte in STREAM))
    assert (await http.post(CHAT, json=ASK_STREAM)).content == STREAM


async def test_events_are_not_held_back(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = stall(chunk("now"))
    async with http.stream("POST", CHAT, json=ASK_STREAM) as response:
        pieces = response.aiter_bytes()
        assert await anext(pieces) == chunk("now")


@pytest.mark.parametrize("cut", range(len(chunk("Hel")), len(STREAM) - 1, 40))
async def test_a_stream_cut_anywhere_ends_in_an_error_event(
    http: httpx.AsyncClient, engine: ScriptedEngine, cut: int
) -> None:
    engine.script = events(STREAM[:cut], end=False)
    response = await http.post(CHAT, json=ASK_STREAM)
    assert response.status_code == 200
    received = frames(response.text)
    assert received[-1]["error"]["code"] == "engine_died"
    assert received[:-1] == frames(STREAM.decode())[: len(received) - 1]


async def test_a_stream_without_its_end_mark_is_not_complete(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = events(chunk("Hel"), end=True)
    assert frames((await http.post(CHAT, json=ASK_STREAM)).text)[-1]["error"]["code"] == "engine_died"


async def test_a_stream_that_dies_before_its_first_event_is_a_502(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = events(chunk("Hel")[:20], end=False)
    response = await http.post(CHAT, json=ASK_STREAM)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "engine_died"


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """No answer at all."""


@pytest.mark.parametrize("script", [broken_answer(), hang_up], ids=["half an answer", "none"])
async def test_an_engine_that_dies_while_answering(
    http: httpx.AsyncClient, engine: ScriptedEngine, script: Script
) -> None:
    engine.script = script
    response = await http.post(CHAT, json=ASK)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "engine_died"
    assert len(engine.requests) == 1


async def test_an_engine_that_is_not_there(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await engine.stop()
    for ask in (ASK, ASK_STREAM):
        response = await http.post(CHAT, json=ask)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize("patience", [0.2])
@pytest.mark.parametrize("ask", [ASK, ASK_STREAM])
async def test_an_engine_that_never_answers_is_given_up(
    http: httpx.AsyncClient, engine: ScriptedEngine, ask: dict[str, Any]
) -> None:
    engine.script = stall()
    response = await http.post(CHAT, json=ask)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "engine_timeout"
    await asyncio.wait_for(engine.left.wait(), 10)


@pytest.mark.parametrize("patience", [0.2])
async def test_an_engine_that_goes_silent_in_a_stream_is_given_up(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = stall(chunk("Hel"))
    received = frames((await http.post(CHAT, json=ASK_STREAM)).text)
    assert received[0]["choices"][0]["delta"]["content"] == "Hel"
    assert received[1]["error"]["code"] == "engine_timeout"


class TestWholeAnswers:
    """An answer that comes as a whole says nothing before its last token."""

    @pytest.fixture
    def patience(self) -> float:
        return 0.2

    @pytest.fixture
    def kind(self) -> Kind:
        return Kind(longest_answer=100, token_seconds=0.3)

    @pytest.mark.parametrize(
        ("fields", "status"),
        [({}, 200), ({"max_tokens": 9}, 200), ({"max_tokens": 1}, 504), ({"stream": True}, 504)],
    )
    async def test_it_has_the_time_that_its_tokens_take(
        self, http: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], status: int
    ) -> None:
        whole = answer(200, ANSWER)

        async def script(writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(1.2)
            await whole(writer)

        engine.script = script
        assert (await http.post(CHAT, json={**ASK, **fields})).status_code == status


@pytest.mark.parametrize("patience", [1.0])
async def test_a_slow_engine_is_not_a_silent_one(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = events(chunk("a"), chunk("b"), chunk("c"), STREAM, pause=0.3)
    assert frames((await http.post(CHAT, json=ASK_STREAM)).text)[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("status", "body", "seen", "code"),
    [
        (400, OVERFLOW_OF_VLLM, 400, "context_length_exceeded"),
        (400, {"error": {"message": "bad grammar", "type": "BadRequestError", "param": None, "code": 400}}, 400, None),
        (422, {"detail": [{"loc": ["body"]}]}, 422, None),
        (503, {"error": {"message": "loading"}}, 503, "engine_unavailable"),
        (500, b"Internal Server Error", 502, "engine_failed"),
        (404, b"<html>", 404, None),
    ],
)
@pytest.mark.parametrize("ask", [ASK, ASK_STREAM])
async def test_an_engines_refusal_has_the_one_shape(
    http: httpx.AsyncClient,
    engine: ScriptedEngine,
    status: int,
    body: Any,
    seen: int,
    code: str | None,
    ask: dict[str, Any],
) -> None:
    engine.script = answer(status, body)
    response = await http.post(CHAT, json=ask)
    assert response.status_code == seen
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == ("invalid_request_error" if seen < 500 else "server_error")
    assert ("retry-after" in response.headers) == (seen == 503)


@pytest.mark.parametrize("ask", [ASK, ASK_STREAM])
async def test_a_client_that_leaves_before_the_first_byte_stops_the_engine(
    http: httpx.AsyncClient, engine: ScriptedEngine, ask: dict[str, Any]
) -> None:
    engine.script = stall()
    asking = asyncio.create_task(http.post(CHAT, json=ask))
    await asyncio.wait_for(engine.arrived.wait(), 60)
    asking.cancel()
    await asyncio.wait_for(engine.left.wait(), 10)


async def test_a_client_that_leaves_a_stream_stops_the_engine(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = stall(chunk("Hel"))
    async with http.stream("POST", CHAT, json=ASK_STREAM) as response:
        pieces = response.aiter_bytes()
        await anext(pieces)
        assert not engine.left.is_set()
    await asyncio.wait_for(engine.left.wait(), 10)


async def test_a_client_that_stays_stops_nothing(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = events(STREAM, pause=0.05)
    assert (await http.post(CHAT, json=ASK_STREAM)).content == STREAM
    assert not engine.left.is_set()


async def test_an_answer_under_way_survives_the_switch_to_another_release(
    http: httpx.AsyncClient, engine: ScriptedEngine, gateway: Gateway, tmp_path: Any
) -> None:
    other = ScriptedEngine(tmp_path / "other.sock")
    await other.start()
    engine.script = events(chunk("Hel"), STREAM, pause=0.2)
    first = asyncio.create_task(http.post(CHAT, json=ASK_STREAM))
    await asyncio.wait_for(engine.arrived.wait(), 60)
    gateway.route(route(other, "r2"))
    draining = asyncio.create_task(gateway.drained(engine.address, timeout=600))
    second = await http.post(CHAT, json=ASK)
    assert second.status_code == 200
    assert other.requests[0]["model"] == "r2"
    assert not draining.done()
    assert (await first).content == chunk("Hel") + STREAM
    await asyncio.wait_for(draining, 60)
    await other.stop()


async def test_draining_ends_at_its_time_and_at_once_where_nothing_runs(
    http: httpx.AsyncClient, engine: ScriptedEngine, gateway: Gateway
) -> None:
    engine.script = stall(chunk("Hel"))
    async with http.stream("POST", CHAT, json=ASK_STREAM) as response:
        pieces = response.aiter_bytes()
        await anext(pieces)
        gateway.route(None)
        began = asyncio.get_running_loop().time()
        await gateway.drained(engine.address, timeout=0.2)
        assert asyncio.get_running_loop().time() - began >= 0.2
        await asyncio.wait_for(gateway.drained("unix:/elsewhere.sock", timeout=600), 60)
    await asyncio.wait_for(gateway.drained(engine.address, timeout=600), 60)
