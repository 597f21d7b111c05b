"""Feedback over the public port: on answers that were given, by who got them, on disk before it is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ANSWER, KEY, OTHER_KEY, STREAM, ScriptedEngine, answer, chunk, events, stall

from appliance.store.database import open_database
from serve.gateway import ledger as module
from serve.gateway.edge import FEEDBACK_LIMIT, Gateway
from serve.gateway.ledger import Ledger

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
ASK_STREAM = {**ASK, "stream": True}
CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
COMPACT = json.dumps(ANSWER, separators=(",", ":")).encode()


def rows(path: Path, table: str = "feedback") -> list[dict[str, Any]]:
    """What is on disk."""
    with contextlib.closing(open_database(path / "appliance.db")) as db:
        return [dict(row) for row in db.execute(f"SELECT * FROM {table}")]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While it holds something, the database may not grow by a page."""
    full: list[bool] = []

    def open_full(path: Path) -> sqlite3.Connection:
        db = open_database(path)
        if full:
            db.execute("PRAGMA cache_size = 1")
            db.execute("PRAGMA max_page_count = 1")
        return db

    monkeypatch.setattr(module, "open_database", open_full)
    return full


@pytest.mark.parametrize(
    ("ask", "script"),
    [
        (ASK, answer(200, ANSWER)),
        (ASK, answer(200, COMPACT)),
        (ASK_STREAM, events(STREAM)),
        (ASK_STREAM, events(STREAM.replace(b": ", b":"))),
        (ASK_STREAM, events(*(bytes([byte]) for byte in STREAM))),
    ],
    ids=["whole", "whole, compact", "stream", "stream, compact", "stream, byte by byte"],
)
async def test_an_answer_can_be_rated(
    http: httpx.AsyncClient, engine: ScriptedEngine, tmp_path: Path, ask: dict[str, Any], script: Any
) -> None:
    engine.script = script
    await http.post(CHAT, json=ask)
    response = await http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "good", "comment": "¡bien!"})
    assert (response.status_code, response.json()) == (200, {"id": "chatcmpl-1", "rating": "good"})
    (row,) = rows(tmp_path)
    assert (row["request"], row["rating"], row["comment"]) == ("chatcmpl-1", "good", "¡bien!")
    (request,) = rows(tmp_path, "requests")
    assert (request["release"], request["key"]) == ("r1", "k1")


async def test_a_correction_alone_says_that_the_answer_was_bad(http: httpx.AsyncClient, tmp_path: Path) -> None:
    await http.post(CHAT, json=ASK)
    response = await http.post(FEEDBACK, json={"id": "chatcmpl-1", "correction": "Hello!", "rating": None})
    assert response.json()["rating"] == "bad"
    assert [(row["rating"], row["correction"]) for row in rows(tmp_path)] == [("bad", "Hello!")]


async def test_the_beginning_of_an_answer_is_enough(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = stall(chunk("Hel"))
    async with http.stream("POST", CHAT, json=ASK_STREAM) as response:
        await anext(response.aiter_bytes())
        said = await http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "bad"})
    assert said.status_code == 200


@pytest.mark.parametrize("who", ["nobody", "other key", "other id", "refused"])
async def test_what_was_not_answered_to_you_is_not_found(
    http: httpx.AsyncClient, engine: ScriptedEngine, who: str
) -> None:
    if who == "refused":
        engine.script = answer(500, {"error": {"id": "chatcmpl-1", "message": "no"}})
    if who != "nobody":
        await http.post(CHAT, json=ASK)
    key = OTHER_KEY if who == "other key" else KEY
    response = await http.post(
        FEEDBACK,
        json={"id": "chatcmpl-2" if who == "other id" else "chatcmpl-1", "rating": "good"},
        headers={"authorization": f"Bearer {key}"},
    )
    assert response.status_code == 404
    problem = response.json()["error"]
    assert (problem["type"], problem["code"], problem["param"]) == ("invalid_request_error", "unknown_answer", "id")


async def test_it_takes_a_key_or_an_operator(url: str, gateway: Gateway, listen: Any) -> None:
    said = {"id": "chatcmpl-1", "rating": "good"}
    async with httpx.AsyncClient(base_url=url) as nobody:
        assert (await nobody.post(FEEDBACK, json=said)).status_code == 401
        assert (await nobody.get(FEEDBACK)).status_code == 405
    async with httpx.AsyncClient(base_url=await listen(gateway.operator)) as operator:
        assert (await operator.post(FEEDBACK, json=said)).status_code == 404
        await operator.post(CHAT, json=ASK)
        assert (await operator.post(FEEDBACK, json=said)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        ({"rating": "good"}, "id"),
        ({"id": "", "rating": "good"}, "id"),
        ({"id": 7, "rating": "good"}, "id"),
        ({"id": "chatcmpl-1"}, "rating"),
        ({"id": "chatcmpl-1", "comment": "hm"}, "rating"),
        ({"id": "chatcmpl-1", "rating": "fine"}, "rating"),
        ({"id": "chatcmpl-1", "rating": ["good"]}, "rating"),
        ({"id": "chatcmpl-1", "rating": 5}, "rating"),
        ({"id": "chatcmpl-1", "correction": " "}, "correction"),
        ({"id": "chatcmpl-1", "correction": "\ud800"}, "correction"),
        ({"id": "chatcmpl-1", "rating": "good", "comment": {}}, "comment"),
        ({"id": "chatcmpl-1", "rating": "good", "stars": 5}, "stars"),
    ],
)
async def test_a_bad_body_is_refused_by_name(
    http: httpx.AsyncClient, tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    await http.post(CHAT, json=ASK)
    response = await http.post(FEEDBACK, content=json.dumps(body))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert f"'{param}'" in response.json()["error"]["message"]


@pytest.mark.parametrize(("content", "status"), [(b"{", 400), (b"[]", 400), (b" " * (FEEDBACK_LIMIT + 1), 413)])
async def test_a_body_that_is_no_object_or_too_large_is_refused(
    http: httpx.AsyncClient, content: bytes, status: int
) -> None:
    assert (await http.post(FEEDBACK, content=content)).status_code == status


async def test_answers_are_written_down_by_and_by_and_known_after_a_restart(
    http: httpx.AsyncClient, gateway: Gateway, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.01)
    writing = asyncio.create_task(ledger.serve())
    for _ in range(3):
        await http.post(CHAT, json=ASK)
    async with asyncio.timeout(60):
        while not rows(tmp_path, "requests"):
            await asyncio.sleep(0.01)
    writing.cancel()
    gateway._ledger = Ledger(tmp_path / "appliance.db")
    assert (await http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "good"})).status_code == 200


async def test_a_full_disk_stops_no_answer_and_loses_none(
    http: httpx.AsyncClient,
    ledger: Ledger,
    full_disk: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.01)
    full_disk.append(True)
    ledger._waiting.extend(module.Answer(f"chatcmpl-{number}", "r1", "k1", 0.0) for number in range(2, 1000))
    writing = asyncio.create_task(ledger.serve())
    await asyncio.sleep(0.1)
    assert (await http.post(CHAT, json=ASK)).status_code == 200
    refused = await http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "bad"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "not_written"
    await asyncio.sleep(0.1)
    writing.cancel()
    failed = [record for record in caplog.records if "answers could not be written" in record.message]
    assert [record.levelno for record in failed] == [logging.ERROR], "said once, not every second"
    full_disk.clear()
    for id in ("chatcmpl-1", "chatcmpl-2", "chatcmpl-999"):
        assert (await http.post(FEEDBACK, json={"id": id, "rating": "bad"})).status_code == 200
