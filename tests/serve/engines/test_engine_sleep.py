"""What an engine says when it is to sleep, and what is believed of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from appliance.errors import InvalidInput
from appliance.settings import load_settings
from serve.engines import openai_engine
from serve.engines.vllm import VllmEngine

Answer = Callable[[], web.StreamResponse]


@asynccontextmanager
async def engine(folder: Path, answer: Answer | None) -> AsyncIterator[str]:
    """The address of one that answers so, or not at all."""

    async def say(request: web.Request) -> web.StreamResponse:
        if answer is None:
            await asyncio.Event().wait()
        assert answer
        return answer()

    app = web.Application()
    app.router.add_post("/sleep", say)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(folder / "engine.sock")).start()
    yield f"unix:{folder / 'engine.sock'}"
    await runner.cleanup()


async def sleep(address: str) -> None:
    await VllmEngine(load_settings({}), gpu=True).sleep(address)


async def test_one_that_sleeps(tmp_path: Path) -> None:
    asked = []

    def answer() -> web.StreamResponse:
        asked.append("sleep")
        return web.json_response({"asleep": True})

    async with engine(tmp_path, answer) as address:
        await sleep(address)
    assert asked == ["sleep"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda: web.json_response({"asleep": False}), ConnectionError),
        (lambda: web.json_response({"status": "sleeping"}), ConnectionError),
        (lambda: web.Response(text="good night"), ConnectionError),
        (lambda: web.Response(body=b"\xff"), ConnectionError),
        (lambda: web.json_response({"error": {"message": "out of memory"}}, status=500), ConnectionError),
        (lambda: web.json_response({"error": {"message": "no such route"}}, status=404), InvalidInput),
    ],
)
async def test_one_that_says_anything_else(tmp_path: Path, answer: Answer, error: type[Exception]) -> None:
    async with engine(tmp_path, answer) as address:
        with pytest.raises(error):
            await sleep(address)


async def test_one_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "_SLEEP_TIMEOUT", aiohttp.ClientTimeout(total=0.1))
    async with engine(tmp_path, None) as address:
        with pytest.raises(ConnectionError, match="could not be put to sleep"):
            await sleep(address)


async def test_one_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="could not be put to sleep"):
        await sleep(f"unix:{tmp_path / 'engine.sock'}")
