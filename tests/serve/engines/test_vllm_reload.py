"""The exchange of weights inside vLLM's server: the middleware on a stand-in, and the whole on the real engine."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import pytest
from chat_templates import DATED, make_tokenizer
from engine_process import Served
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from appliance.supervisor.engines import Probe
from serve.engines.openai_engine import ASLEEP
from serve.engines.vllm_reload import CLOCK, Reload

ASKED = {"name": "r2", "weights": "/releases/r2"}
ASKED_TEXT = [{"role": "user", "content": "hello"}]


class EngineClient:
    """The calls that vLLM's engine client gets, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.cache_is_free = True
        self.broken = False
        self.sleeps = True
        self.wakes = True
        tokenizer = make_tokenizer(DATED)
        self.renderer = SimpleNamespace(get_tokenizer=lambda: tokenizer)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(("pause", mode, clear_cache))

    async def collective_rpc(self, method: str, kwargs: dict[str, str]) -> list[None]:
        self.calls.append((method, kwargs))
        if self.broken:
            raise OSError("no such directory")
        return [None]

    async def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return self.cache_is_free

    async def sleep(self, level: int, mode: str) -> None:
        self.calls.append(("sleep", level, mode))

    async def is_sleeping(self) -> bool:
        return self.sleeps

    async def wake_up(self, tags: list[str]) -> bool:
        self.calls.append(("wake", tags))
        return self.wakes and tags == ["kv_cache"]

    async def resume_generation(self) -> None:
        self.calls.append("resume")


@pytest.fixture
def app() -> Starlette:
    async def models(request: Request) -> JSONResponse:
        return JSONResponse(request.app.state.openai_serving_models.base_model_paths[0].name)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({})

    routes = [Route("/v1/models", models), Route("/health", health)]
    app = Starlette(routes=routes, middleware=[Middleware(Reload)])
    app.state.engine_client = EngineClient()
    app.state.openai_serving_models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="r1")], lora_requests={"r0+adapter": object()}
    )
    return app


def client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine")


async def test_weights_cache_and_name_change_while_nothing_is_generated(app: Starlette) -> None:
    async with client(app) as engine:
        assert (await engine.get("/v1/models")).json() == "r1"
        answer = await engine.post("/reload", json=ASKED)
        assert (answer.status_code, answer.json()) == (200, {"model": "r2"})
        assert (await engine.get("/v1/models")).json() == "r2"
    assert app.state.openai_serving_models.lora_requests == {}, "adapters belong to the weights before"
    assert app.state.engine_client.calls == [
        ("pause", "abort", True),
        ("reload_weights", {"weights_path": "/releases/r2"}),
        "reset",
        "resume",
    ]


async def test_the_template_is_told_the_day_of_the_release_from_the_first_request_on(
    app: Starlette, monkeypatch: pytest.MonkeyPatch
) -> None:
    def today() -> str:
        return str(tokenizer.apply_chat_template(ASKED_TEXT, tokenize=False)).partition("\n")[0]

    monkeypatch.setenv(CLOCK, "2024-02-29")
    tokenizer = app.state.engine_client.renderer.get_tokenizer()
    async with client(app) as engine:
        await engine.get("/v1/models")
        assert today() == "It is 29 Feb 2024."
        await engine.post("/reload", json=ASKED)
        assert today() == "It is 29 Feb 2024."
        await engine.post("/reload", json={**ASKED, "clock": "2024-03-09"})
        assert today() == "It is 09 Mar 2024."
        await engine.get("/v1/models")
        assert today() == "It is 09 Mar 2024."


@pytest.mark.parametrize("fault", ["weights", "cache"])
async def test_what_fails_keeps_the_old_name_and_says_so(app: Starlette, fault: str) -> None:
    app.state.engine_client.broken = fault == "weights"
    app.state.engine_client.cache_is_free = fault != "cache"
    async with client(app) as engine:
        answer = await engine.post("/reload", json=ASKED)
        assert answer.status_code == 500
        assert ("no such directory" if fault == "weights" else "prefix cache") in answer.json()["error"]["message"]
        assert (await engine.get("/v1/models")).json() == "r1"
    assert app.state.engine_client.calls[-1] == "resume"


async def test_it_sleeps_and_answers_nothing_until_it_wakes_on_new_weights(app: Starlette) -> None:
    calls = app.state.engine_client.calls
    async with client(app) as engine:
        assert (await engine.get("/health")).status_code == 200
        answer = await engine.post("/sleep", json={})
        assert (answer.status_code, answer.json()) == (200, ASLEEP)
        assert calls == [("sleep", 2, "abort")]
        for path in ("/health", "/v1/models", "/v1/chat/completions"):
            refused = await engine.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
        calls.clear()
        assert (await engine.post("/reload", json=ASKED)).json() == {"model": "r2"}
        assert (await engine.get("/v1/models")).json() == "r2"
    assert calls == [
        ("wake", ["weights"]),
        ("reload_weights", {"weights_path": "/releases/r2"}),
        ("wake", ["kv_cache"]),
        "reset",
        "resume",
    ], "the cache gets its memory when the weights have theirs"


async def test_what_does_not_sleep_says_so_and_is_not_trusted_again(app: Starlette) -> None:
    app.state.engine_client.sleeps = False
    async with client(app) as engine:
        answer = await engine.post("/sleep", json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "sleep_failed")
        assert (await engine.get("/health")).status_code == 503


@pytest.mark.parametrize("fault", ["weights", "memory"])
async def test_what_does_not_wake_says_so_and_sleeps_on(app: Starlette, fault: str) -> None:
    app.state.engine_client.broken = fault == "weights"
    app.state.engine_client.wakes = fault != "memory"
    async with client(app) as engine:
        await engine.post("/sleep", json={})
        answer = await engine.post("/reload", json=ASKED)
        assert answer.status_code == 500
        assert ("no such directory" if fault == "weights" else "only in part") in answer.json()["error"]["message"]
        assert (await engine.get("/health")).status_code == 503


def test_vllm_takes_these_calls() -> None:
    """The double above against vLLM's own client, executor and workers."""
    llm: Any = pytest.importorskip("vllm.v1.engine.async_llm").AsyncLLM
    for name, call in vars(EngineClient).items():
        if not name.startswith("_"):
            ours, theirs = inspect.signature(call).parameters, inspect.signature(getattr(llm, name)).parameters
            assert set(ours) <= set(theirs), name
    executor: Any = pytest.importorskip("vllm.v1.executor.abstract")
    assert sorted(executor.SLEEP_TAGS) == ["kv_cache", "weights"]
    workers: Any = pytest.importorskip("vllm.v1.worker.gpu_worker").Worker
    assert callable(workers.reload_weights)
    assert {"sleep", "wake_up"} <= set(dir(workers))
    reload: Any = pytest.importorskip("vllm.model_executor.model_loader.reload.inplace").reload_weights
    assert "weights_path" in inspect.signature(reload).parameters


async def test_a_request_that_is_no_json(app: Starlette) -> None:
    async with client(app) as engine:
        assert (await engine.post("/reload", content=b"{")).status_code == 400
    assert app.state.engine_client.calls == []


@pytest.fixture
def other(served: Served, tmp_path: Path) -> Path:
    """A model with other weights in the same files: its layers in reverse order."""
    if not served.kind.reloads:
        pytest.skip("this engine cannot take other weights")
    model = tmp_path / "other"
    shutil.copytree(served.model, model)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        layers = json.loads((model / "config.json").read_bytes())["num_hidden_layers"]
        turned = {}
        for name, tensor in tensors.items():
            before, found, after = name.partition("layers.")
            number, _, rest = after.partition(".")
            turned[f"{before}layers.{layers - 1 - int(number)}.{rest}" if found else name] = tensor
        save_file(turned, file, metadata={"format": "pt"})
    return model


async def ask(served: Served, model: str) -> tuple[str, str]:
    """The answer and the name under which it is given."""
    connector = aiohttp.UnixConnector(served.address.removeprefix("unix:"))
    messages = [{"role": "user", "content": "Name three colours."}]
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://engine/v1/chat/completions", json=body) as response,
    ):
        answer = await response.json()
        assert response.status == 200, answer
        return answer["choices"][0]["message"]["content"], answer["model"]


@pytest.mark.slow
async def test_a_real_engine_sleeps_and_wakes_on_other_weights_and_back(served: Served, other: Path) -> None:
    """On a CPU vLLM gives no memory back, and goes the same way through sleep."""
    before = await ask(served, "r1")
    try:
        await served.kind.sleep(served.address)
        assert not await served.kind.ready(served.address)
        await served.kind.reload(served.address, other, "r2")
        assert await served.kind.ready(served.address)
        text, name = await ask(served, "r2")
        assert (name, text != before[0]) == ("r2", True)
        await served.kind.sleep(served.address)
    finally:
        await served.kind.reload(served.address, served.model, "r1")
    assert await ask(served, "r1") == before


@pytest.mark.slow
async def test_a_real_engine_goes_on_with_other_weights_and_back(served: Served, other: Path, tmp_path: Path) -> None:
    before, name = await ask(served, "r1")
    assert name == "r1"
    await served.kind.reload(served.address, other, "r2")
    try:
        text, name = await ask(served, "r2")
        assert name == "r2"
        assert text != before, "the cache of the old weights is not used"
        with pytest.raises(ConnectionError, match="could not load other weights"):
            await served.kind.reload(served.address, tmp_path / "nowhere", "r3")
    finally:
        await served.kind.reload(served.address, served.model, "r1")
    assert await ask(served, "r1") == (before, "r1")
    probe = Probe([{"role": "user", "content": "Name three colours."}], [], 12)
    assert (await served.kind.probe(served.address, "r1", probe)).text == before
