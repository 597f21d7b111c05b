"""What the public port lets through, and whom."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from scripted_engine import ANSWER, Kind, ScriptedEngine, answer, events, route

from serve.gateway.edge import BODY_LIMIT, Gateway
from serve.gateway.ledger import Ledger
from serve.wire import asgi, fields

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


def error(response: httpx.Response) -> dict[str, Any]:
    """The error in the one shape that all errors have."""
    problem: dict[str, Any] = response.json()["error"]
    assert set(problem) == {"message", "type", "param", "code"}
    assert problem["type"] == ("invalid_request_error" if response.status_code < 500 else "server_error")
    return problem


async def test_an_answer_comes_through_byte_for_byte(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = await http.post(CHAT, json=ASK)
    assert response.status_code == 200
    assert response.json() == ANSWER
    assert response.headers["x-request-id"].startswith("req_")
    assert engine.requests == [{**ASK, "model": "r1"}]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_thought_comes_under_the_key_that_clients_know(
    http: httpx.AsyncClient, engine: ScriptedEngine, stream: bool
) -> None:
    """vLLM has another; a text that names it stays as it is."""
    text = 'The key "reasoning": is told.'
    said = {"content": text, "reasoning": text}
    choice = {"index": 0, "message": {"role": "assistant", **said}, "delta": said, "finish_reason": "stop"}
    whole = {**ANSWER, "choices": [choice]}
    event = b"data: " + json.dumps(whole).encode() + b"\n\n"
    engine.script = events(event, b"data: [DONE]\n\n") if stream else answer(200, whole)
    got = (await http.post(CHAT, json={**ASK, "stream": stream})).text
    found = json.loads(got.partition("data: ")[2].partition("\n\n")[0] if stream else got)["choices"][0]
    for part in ("delta", "message"):
        assert (found[part]["content"], found[part]["reasoning_content"]) == (text, text)
        assert "reasoning" not in found[part]


@pytest.mark.parametrize("model", ["live", "r1", None])
async def test_the_engine_is_asked_for_the_release_by_its_id(
    http: httpx.AsyncClient, engine: ScriptedEngine, model: str | None
) -> None:
    assert (await http.post(CHAT, json={**ASK, "model": model})).status_code == 200
    assert engine.requests[0]["model"] == "r1"


@pytest.mark.parametrize(
    ("model", "asked"), [("live", "r2+adapter"), ("r2+adapter", "r2+adapter"), ("r1", "r1"), ("r2", None)]
)
async def test_an_adapter_answers_and_the_release_beneath_it_only_who_names_that(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine, model: str, asked: str | None
) -> None:
    gateway.route(replace(route(engine, "r2+adapter"), beneath="r1"))
    response = await http.post(CHAT, json={**ASK, "model": model})
    assert response.status_code == (200 if asked else 404)
    assert [request["model"] for request in engine.requests] == ([asked] if asked else [])


async def test_another_model_is_not_found(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = await http.post(CHAT, json={**ASK, "model": "gpt-4"})
    assert response.status_code == 404
    assert error(response)["code"] == "model_not_found"
    assert error(response)["param"] == "model"
    assert engine.requests == []


async def test_models_are_the_alias_and_the_release(http: httpx.AsyncClient, gateway: Gateway) -> None:
    listed = (await http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["live", "r1"]
    gateway.route(None)
    assert (await http.get("/v1/models")).json()["data"] == []


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic sk-good", "missing_api_key"),
        ("sk-good", "missing_api_key"),
        ("Bearer sk-bad", "invalid_api_key"),
        ("Bearer \xff", "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
async def test_without_a_good_key_nothing_is_told(
    url: str, engine: ScriptedEngine, path: str, header: str | None, code: str
) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        headers = {} if header is None else {b"authorization": header.encode("latin-1")}
        method = "POST" if path == CHAT else "GET"
        response = await client.request(method, path, headers=headers, json=ASK if path == CHAT else None)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error(response)["code"] == code
    assert engine.requests == []


async def test_the_scheme_is_bearer_in_any_case(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, headers={"authorization": "bearer sk-good"}) as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/tokenize", "/metrics", "/v1/completions", "/v1/chat/completions/", "//v1/models", "/docs"]
)
async def test_what_is_not_on_the_list_does_not_exist(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(path)
    assert response.status_code == 404
    assert error(response)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("DELETE", "/v1/models/r1", "GET"),
        ("POST", "/healthz", "GET, HEAD"),
    ],
)
async def test_the_wrong_method(http: httpx.AsyncClient, method: str, path: str, allowed: str) -> None:
    response = await http.request(method, path)
    assert response.status_code == 405
    assert error(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_health_may_be_asked_by_head(http: httpx.AsyncClient, path: str) -> None:
    response = await http.head(path)
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("name", ["live", "r1"])
async def test_a_model_by_its_name(http: httpx.AsyncClient, name: str) -> None:
    listed = (await http.get("/v1/models")).json()["data"]
    assert (await http.get(f"/v1/models/{name}")).json() == next(each for each in listed if each["id"] == name)
    missing = await http.get("/v1/models/gpt-4")
    assert (missing.status_code, error(missing)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("key", ["name", "model", "path"])
async def test_what_a_client_sends_is_not_sent_back_whole(http: httpx.AsyncClient, key: str) -> None:
    long = "x" * 60_000
    asked = {**ASK, "model": long} if key == "model" else {**ASK, long: 1}
    response = await (http.get(f"/{long}") if key == "path" else http.post(CHAT, json=asked))
    assert response.status_code in (400, 404)
    assert len(response.content) < 1000


async def test_a_name_of_megabytes_is_not_compared_with_others(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    monkeypatch.setattr(fields.difflib, "get_close_matches", lambda name, *_, **__: compared.append(len(name)) or [])
    assert (await http.post(CHAT, json={**ASK, "x" * 3_000_000: 1})).status_code == 400
    assert (await http.post(CHAT, json={**ASK, "modle": 1})).status_code == 400
    assert compared == [5]


@pytest.mark.parametrize("junk", ["[],", '"",', "1,", '{"a":1},'])
async def test_a_request_of_a_million_values_is_refused_before_it_is_read(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, junk: str
) -> None:
    body = '{"messages":[' + junk * (3_500_000 // len(junk)) + junk[:-1] + "]}"
    monkeypatch.setattr(asgi, "json", SimpleNamespace(dumps=json.dumps))
    response = await http.post(CHAT, content=body.encode())
    assert (response.status_code, error(response)["code"]) == (400, "too_many_values")


async def test_texts_of_megabytes_are_no_values(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    text = 'a, [b], {"c"}, \\" \n' * 150_000
    asked = {"messages": [{"role": "user", "content": text}]}
    assert (await http.post(CHAT, json=asked)).status_code == 200
    assert engine.requests[0]["messages"] == asked["messages"]


async def test_a_large_request_is_parsed_beside_the_loop(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    parse = asgi.parse_json

    def noted(body: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse(body)

    monkeypatch.setattr(asgi, "parse_json", noted)
    for size in (10, 100_000):
        assert (await http.post(CHAT, json={"messages": [{"role": "user", "content": "x" * size}]})).status_code == 200
    assert threads == [True, False]


async def test_health_and_readiness_need_no_key_and_differ(url: str, gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/healthz")).status_code == 200
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["model"] == "r1"
        gateway.route(None)
        assert (await client.get("/healthz")).status_code == 200
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert int(ready.headers["retry-after"]) > 0


async def test_with_no_live_release_it_says_what_to_do(http: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.route(None)
    response = await http.post(CHAT, json=ASK)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert "promote" in error(response)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe{",
        b'{"temperature": NaN}',
        b"[" * 40_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
async def test_what_is_no_json_object(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post(CHAT, content=body)
    assert response.status_code == 400
    assert error(response)["code"] == "invalid_json"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_request_that_is_too_large(http: httpx.AsyncClient, engine: ScriptedEngine, chunked: bool) -> None:
    body = b" " * (BODY_LIMIT + 1)

    async def pieces() -> Any:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    response = await http.post(CHAT, content=pieces() if chunked else body)
    assert response.status_code == 413
    assert error(response)["code"] == "request_too_large"
    assert engine.requests == []
    assert (await http.post(CHAT, json=ASK)).status_code == 200


async def test_a_field_that_would_be_ignored_is_refused_by_name(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    response = await http.post(CHAT, json={**ASK, "logprobs": True})
    assert response.status_code == 400
    assert error(response)["param"] == "logprobs"
    assert engine.requests == []


async def test_operators_need_no_key_and_reach_only_what_is_for_them(
    gateway: Gateway, listen: Callable[[Any], Any], engine: ScriptedEngine
) -> None:
    async with httpx.AsyncClient(base_url=await listen(gateway.operator)) as client:
        assert (await client.post(CHAT, json=ASK)).json() == ANSWER
        assert (await client.get("/v1/models")).status_code == 404
        assert (await client.get("/healthz")).status_code == 404


async def test_a_fault_of_the_gateway_itself_has_the_same_shape(
    url: str, ledger: Ledger, listen: Callable[[Any], Any]
) -> None:
    def break_down(key: str) -> str:
        raise RuntimeError("database gone")

    async with httpx.AsyncClient(base_url=await listen(Gateway(break_down, ledger, Kind()))) as client:
        response = await client.get("/v1/models", headers={"authorization": "Bearer sk-good"})
    assert response.status_code == 500
    assert "database" not in error(response)["message"]
