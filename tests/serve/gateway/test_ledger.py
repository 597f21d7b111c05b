"""Feedback over the public port: on answers that were given, by who got them, on disk before it is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ANSWER, KEY, OTHER_KEY, STREAM, ScriptedEngine, answer, chunk, events, stall

from appliance import sqlite
from appliance import traffic as module
from appliance.sqlite import connect
from appliance.traffic import Traffic
from serve.gateway.account import Account
from serve.gateway.edge import CLIENT_LEFT, FEEDBACK_LIMIT, Gateway
from serve.gateway.ledger import Ledger

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
ASK_STREAM = {**ASK, "stream": True}
CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
COMPACT = json.dumps(ANSWER, separators=(",", ":")).encode()


def rows(path: Path, table: str = "feedback") -> list[dict[str, Any]]:
    """What is on disk."""
    with contextlib.closing(connect(path / "traffic.db", module.MIGRATIONS)) as db:
        return [dict(row) for row in db.execute(f"SELECT * FROM {table}")]


async def recorded(path: Path, count: int) -> list[dict[str, Any]]:
    """The requests on disk, as soon as so many are there to their end."""
    async with asyncio.timeout(60):
        while len(found := [row for row in rows(path, "requests") if row["status"]]) < count:
            await asyncio.sleep(0.05)
    return found


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While it holds something, the database may not grow by a page."""
    full: list[bool] = []
    transaction = module.transaction

    @contextlib.contextmanager
    def limited(db: sqlite3.Connection) -> Iterator[None]:
        db.execute("PRAGMA cache_size = 1")
        db.execute(f"PRAGMA max_page_count = {1 if full else 1 << 30}")
        with transaction(db):
            yield

    monkeypatch.setattr(module, "transaction", limited)
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
    assert (row["answer"], row["rating"], row["comment"]) == ("chatcmpl-1", "good", "¡bien!")
    (request,) = rows(tmp_path, "requests")
    assert (request["model"], request["key"]) == ("r1", "k1")


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
    http: httpx.AsyncClient, gateway: Gateway, traffic: Traffic, tmp_path: Path
) -> None:
    await http.post(CHAT, json=ASK)
    await asyncio.to_thread(traffic.close)
    again = Traffic(tmp_path / "traffic.db")
    again.start()
    gateway._ledger._traffic = again
    assert (await http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "good"})).status_code == 200
    await asyncio.to_thread(again.close)


async def test_a_full_disk_stops_no_answer_and_loses_none(
    http: httpx.AsyncClient, full_disk: list[bool], traffic: Traffic, caplog: pytest.LogCaptureFixture
) -> None:
    full_disk.append(True)
    account = Account("chat", "k1")
    for number in range(2, 1000):
        account.id, account.answer = f"req_{number}", f"chatcmpl-{number}"
        Ledger(traffic).begun(account)
    for _ in range(3):
        assert (await http.post(CHAT, json=ASK)).status_code == 200
        refused = await http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "bad"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "not_written"
    failed = [record for record in caplog.records if "traffic could not be written" in record.message]
    assert [record.levelno for record in failed] == [logging.ERROR], "said once, not every second"
    full_disk.clear()
    for id in ("chatcmpl-1", "chatcmpl-2", "chatcmpl-999"):
        assert (await http.post(FEEDBACK, json={"id": id, "rating": "bad"})).status_code == 200


async def test_a_held_lock_stops_no_answer_and_loses_none(
    http: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.2)
    threads: set[threading.Thread] = set()

    def noted(*arguments: Any) -> sqlite3.Connection:
        threads.add(threading.current_thread())
        return connect(*arguments)

    monkeypatch.setattr(module, "connect", noted)
    with contextlib.closing(connect(tmp_path / "traffic.db", module.MIGRATIONS)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        for _ in range(5):
            assert (await http.post(CHAT, json=ASK)).status_code == 200
        asked = asyncio.create_task(http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "bad"}))
        assert (await http.post(CHAT, json=ASK_STREAM)).status_code == 200
        assert (await asked).status_code == 503
        holder.execute("ROLLBACK")
    assert threads, "it has tried"
    assert threading.main_thread() not in threads, "nobody who answers waits for the lock"
    assert (await http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "bad"})).status_code == 200
    assert len(await recorded(tmp_path, 6)) == 6


async def test_a_slow_disk_stops_no_answer(
    http: httpx.AsyncClient, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes = threading.Event()
    write = traffic._write

    def slowly(*arguments: Any) -> None:
        wakes.wait(60)
        write(*arguments)

    monkeypatch.setattr(traffic, "_write", slowly)
    asked = asyncio.create_task(http.post(FEEDBACK, json={"id": "chatcmpl-1", "rating": "bad"}))
    for _ in range(5):
        assert (await http.post(CHAT, json=ASK)).status_code == 200
    assert not asked.done()
    wakes.set()
    await asked


async def test_what_was_said_is_kept_though_nobody_waits_for_it_any_more(
    http: httpx.AsyncClient, ledger: Ledger, traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await http.post(CHAT, json=ASK)
    goes_on, begun, write = threading.Event(), threading.Event(), traffic._write

    def slowly(db: Any, requests: Any, remarks: Any) -> None:
        if remarks:
            begun.set()
            goes_on.wait(60)
        write(db, requests, remarks)

    monkeypatch.setattr(traffic, "_write", slowly)
    saying = asyncio.create_task(ledger.give(module.Remark("chatcmpl-1", "bad"), "k1"))
    await asyncio.to_thread(begun.wait, 60)
    saying.cancel()
    await asyncio.wait([saying])
    goes_on.set()
    await ledger.give(module.Remark("chatcmpl-1", "bad", comment="again"), "k1")
    assert [row["comment"] for row in rows(tmp_path)] == ["again"]


async def test_an_account_says_all_of_a_request(
    http: httpx.AsyncClient, engine: ScriptedEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    usage = json.dumps({"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    engine.script = events(chunk("Hel"), chunk("lo", "stop"), f"data: {usage}\n\n".encode(), b"data: [DONE]\n\n")
    streamed = await http.post(CHAT, json={**ASK_STREAM, "model": "r1"}, headers={"x-conversation-id": "c"})
    assert "usage" not in streamed.text
    engine.script = answer(200, ANSWER)
    whole = await http.post(CHAT, json=ASK)
    refused = await http.post(CHAT, json={**ASK, "model": "gpt"})
    engine.script = answer(500, {"error": {"message": "CUDA error"}})
    failed = await http.post(CHAT, json=ASK)
    broken = await http.post(CHAT, content=b"{")
    found = {row["id"]: row for row in await recorded(tmp_path, 5)}
    rows = [found[response.headers["x-request-id"]] for response in (streamed, whole, refused, failed, broken)]
    assert [(row["status"], row["error"]) for row in rows] == [
        (200, ""),
        (200, ""),
        (404, "model_not_found"),
        (502, "engine_failed"),
        (400, "invalid_json"),
    ]
    assert [(row["asked"], row["model"], row["deployment"]) for row in rows] == [
        ("r1", "r1", "live"),
        ("live", "r1", "live"),
        ("gpt", "", ""),
        ("live", "r1", "live"),
        ("", "", ""),
    ]
    assert [(row["prompt_tokens"], row["completion_tokens"], row["finish"]) for row in rows[:2]] == [(3, 2, "stop")] * 2
    assert {row["key"] for row in rows} == {"k1"}
    assert rows[0]["conversation"] == "k1/header/c"
    for row in rows[:2]:
        assert row["arrived"] <= row["sent"] <= row["first_byte"] <= row["last_byte"]
    for id in found:
        assert any(id in record.getMessage() for record in caplog.records), "the log knows it by its id"


async def test_a_client_that_leaves_is_on_record(
    http: httpx.AsyncClient, engine: ScriptedEngine, tmp_path: Path
) -> None:
    engine.script = stall()
    asking = asyncio.create_task(http.post(CHAT, json=ASK))
    await asyncio.wait_for(engine.arrived.wait(), 60)
    asking.cancel()
    (row,) = await recorded(tmp_path, 1)
    assert (row["status"], row["model"], row["first_byte"]) == (CLIENT_LEFT, "r1", None)


async def test_names_that_no_database_takes_stop_no_writing(http: httpx.AsyncClient, tmp_path: Path) -> None:
    for fields in ({"user": "\ud800"}, {"model": "\ud800"}, {"user": "x" * 100_000}):
        await http.post(CHAT, content=json.dumps({**ASK, **fields}))
    assert len(await recorded(tmp_path, 3)) == 3
