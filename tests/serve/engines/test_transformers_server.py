"""The embedded engine's HTTP face, in this process and on a tiny model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from appliance.settings import load_settings
from appliance.supervisor.engines import Probe
from serve.engines import transformers_server
from serve.engines.generation import EngineDead, Generator
from serve.engines.transformers import TransformersEngine
from serve.engines.transformers_server import Server

MESSAGES = [{"role": "user", "content": "Hi"}]
ASK: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def http(generator: Generator) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Server(generator, "r1"))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        yield client


async def test_an_answer_and_its_stream_say_the_same(http: httpx.AsyncClient) -> None:
    whole = (await http.post(CHAT, json=ASK)).json()
    stream = (await http.post(CHAT, json={**ASK, "stream": True, "stream_options": {"include_usage": True}})).text
    chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 8
    assert whole["choices"][0]["finish_reason"] == "length"


async def test_tokenize_renders_as_the_tokenizer_does(http: httpx.AsyncClient, generator: Generator) -> None:
    told = (
        await http.post("/tokenize", json={"model": "r1", "messages": MESSAGES, "add_generation_prompt": True})
    ).json()
    expected = generator.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert told == {"count": len(expected), "max_model_len": 512, "tokens": expected}
    used = (await http.post(CHAT, json=ASK)).json()["usage"]["prompt_tokens"]
    assert used == len(expected)


async def test_a_thought_is_told_apart_where_the_template_knows_thoughts(
    http: httpx.AsyncClient, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt opens it, and this model never closes it."""
    said = (await http.post(CHAT, json=ASK)).json()["choices"][0]["message"]
    assert said["content"]
    assert "reasoning_content" not in said
    opens = "{% if add_generation_prompt and enable_thinking %}<think>{% endif %}{# </think> #}"
    monkeypatch.setattr(generator.tokenizer, "chat_template", str(generator.tokenizer.chat_template) + opens)
    said = (await http.post(CHAT, json=ASK)).json()["choices"][0]["message"]
    assert said["content"]
    for asked in ({"chat_template_kwargs": {"enable_thinking": True, "unknown": "x"}}, {"reasoning_effort": "low"}):
        said = (await http.post(CHAT, json={**ASK, **asked})).json()["choices"][0]["message"]
        assert said["content"] == ""
        assert said["reasoning_content"]


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_without_a_limit_an_answer_ends_with_the_context(
    http: httpx.AsyncClient, generator: Generator, limit: str
) -> None:
    long = [{"role": "user", "content": "x" * 440}]
    prompt = len(generator.render(long))
    for field in ({}, {limit: 512}):
        ask = {"messages": long, "temperature": 0, "ignore_eos": True, **field}
        whole = (await http.post(CHAT, json=ask)).json()
        assert whole["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": 512 - prompt,
            "total_tokens": 512,
        }
        assert whole["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"max_completion_tokens": 513}, "max_completion_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_beyond_the_context(http: httpx.AsyncClient, fields: dict[str, Any], param: str, stream: bool) -> None:
    response = await http.post(CHAT, json={**ASK, "stream": stream, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "512" in error["message"]


async def test_a_text_of_megabytes_is_refused_by_its_size(
    http: httpx.AsyncClient, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[int] = []
    monkeypatch.setattr(generator, "render", lambda messages, *_, **__: rendered.append(len(messages)) or [1])
    long = [{"role": "user", "content": "x" * (2 << 20)}, {"role": "user", "content": "x" * (2 << 20)}]
    for path in (CHAT, "/tokenize"):
        response = await http.post(path, json={"messages": long})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert rendered == [], "nothing was tokenised"
    assert (await http.post("/tokenize", json={"messages": MESSAGES})).status_code == 200
    assert rendered == [1]


async def test_prompts_are_tokenised_a_few_at_a_time(
    http: httpx.AsyncClient, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def render(*arguments: Any, **named: Any) -> list[int]:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return [1]

    monkeypatch.setattr(generator, "render", render)
    await asyncio.gather(*(http.post("/tokenize", json={"messages": MESSAGES}) for _ in range(12)))
    assert most == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"logprobs": True}, "logprobs"), ({"presence_penalty": 1}, "presence_penalty"), ({"nonsense": 1}, "nonsense")],
)
async def test_what_it_cannot_do_it_refuses(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await http.post(CHAT, json={**ASK, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_another_model_or_path_is_not_found(http: httpx.AsyncClient) -> None:
    assert (await http.post(CHAT, json={**ASK, "model": "r2"})).status_code == 404
    assert (await http.get("/v1/models")).status_code == 404
    assert (await http.get("/health")).status_code == 200


async def test_messages_that_the_template_refuses(
    http: httpx.AsyncClient, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(generator.tokenizer, "chat_template", template)
    response = await http.post(CHAT, json=ASK)
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


class Client:
    """A client that reads what it gets until it has had enough, and is then gone."""

    def __init__(self, body: dict[str, Any], leaves_after: int) -> None:
        self._body = json.dumps(body).encode()
        self._leaves_after = leaves_after
        self._asked = False
        self._gone = asyncio.Event()
        if not leaves_after:
            asyncio.get_running_loop().call_later(0.1, self._gone.set)

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self._leaves_after -= 1
            if self._leaves_after == 0:
                self._gone.set()


@pytest.mark.parametrize(("stream", "leaves_after"), [(True, 20), (True, 0), (False, 0)])
async def test_a_client_that_leaves_frees_its_places(generator: Generator, stream: bool, leaves_after: int) -> None:
    client = Client({**ASK, "max_tokens": 480, "n": 2, "stream": stream}, leaves_after)
    answering = asyncio.create_task(
        Server(generator, "r1")({"type": "http", "method": "POST", "path": CHAT}, client.receive, client.send)
    )
    scheduler = generator._manager.batch_processor.scheduler
    before = generator._manager.current_batch
    began = False
    while not answering.done():
        began |= len(scheduler.active_requests) == 2
        await asyncio.sleep(0.005)
    answering.result()
    assert began
    for _ in range(100):
        if not scheduler.active_requests:
            break
        await asyncio.sleep(0.01)
    assert scheduler.active_requests == {}
    assert generator._manager.current_batch - before < 400


async def test_a_dead_engine_says_so(http: httpx.AsyncClient, generator: Generator, monkeypatch: Any) -> None:
    monkeypatch.setattr(Generator, "alive", False)
    for response in (await http.get("/health"), await http.post(CHAT, json=ASK)):
        assert response.status_code == 503
        assert response.headers["retry-after"]


async def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error(
    http: httpx.AsyncClient, generator: Generator, monkeypatch: Any
) -> None:
    generate = generator.generate

    async def broken(*arguments: Any) -> Any:
        async for piece in generate(*arguments):
            yield piece
            raise EngineDead("out of memory")

    monkeypatch.setattr(generator, "generate", broken)
    stream = (await http.post(CHAT, json={**ASK, "stream": True})).text
    last = json.loads(stream.strip().split("\n\n")[-1][6:])
    assert last["error"]["type"] == "server_error"
    assert "[DONE]" not in stream


async def test_the_process_of_a_dead_engine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_server, "_LAST_WORDS_SECONDS", 0)
    generator, server = SimpleNamespace(alive=True), SimpleNamespace(should_exit=False)
    watching = asyncio.create_task(transformers_server._end_when_dead(generator, server))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    assert not server.should_exit
    generator.alive = False
    await asyncio.wait_for(watching, 60)
    assert server.should_exit


async def test_a_probe_is_told_what_the_model_thinks_and_says(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A thought that fills the room is an answer to be repeated all the same."""
    opens = "{% if add_generation_prompt %}<think>{% endif %}{# </think> #}"
    monkeypatch.setattr(generator.tokenizer, "chat_template", str(generator.tokenizer.chat_template) + opens)
    config = uvicorn.Config(Server(generator, "r1"), uds=str(tmp_path / "e.sock"), lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    engine = TransformersEngine(load_settings({}))
    answer = await engine.probe(f"unix:{tmp_path / 'e.sock'}", "r1", Probe(MESSAGES, [], 8))
    server.should_exit = True
    await serving
    assert answer.text
