"""A real daemon with engines that invent their answers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from box import Box
from invented_box import SERVE, started


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Box]:
    """A daemon with the releases old, which answers, and new."""
    async with started(monkeypatch, SERVE) as box:
        yield box


@pytest.fixture
async def key(running: Box) -> str:
    return (await running.client.create_key("test")).key
