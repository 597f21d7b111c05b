"""Whether an engine answers, and whether that can be asked at all."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from serve.engines.openai_engine import OpenAIEngine


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_an_engine_that_cannot_be_asked_is_not_one_that_does_not_answer(tmp_path: Path) -> None:
    async def health(request: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "s")).start()
    engine, address = OpenAIEngine(), f"unix:{tmp_path / 's'}"
    try:
        assert await engine.ready(address)
        with no_more_files(), pytest.raises(OSError, match="Too many open files"):
            await engine.ready(address)
        assert await engine.ready(address)
    finally:
        await runner.cleanup()
    assert not await engine.ready(address)
