"""A canary on a real daemon with engines that invent their answers, under clients that ask without pause."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from box import Box

from appliance import api

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CLIENTS = 4


async def ended(box: Box) -> api.Canary:
    """What became of the canary."""

    async def outcome() -> api.Canary | None:
        canary = next(release.canary for release in await box.client.releases() if release.id == "new")
        return canary if canary and canary.ended else None

    canary: api.Canary = await box.until("the end of the canary", outcome, 60)
    return canary


class Clients:
    """Clients that ask, each in one conversation after the other; `failed` and `answered` hold what came of it.

    They rate the answers of the releases in `opinions`.
    """

    def __init__(self, opinions: dict[str, api.Rating]) -> None:
        self.opinions = opinions
        self.failed: list[str] = []
        self.answered: Counter[str] = Counter()
        self.sides: dict[str, set[str]] = {}

    async def ask(self, http: httpx.AsyncClient, conversation: str, stream: bool) -> None:
        body = {"model": "live", "messages": [{"role": "user", "content": "Who?"}], "stream": stream}
        response = await http.post("/chat/completions", json=body, headers={"x-conversation-id": conversation})
        id, model, text = read(response) if response.status_code == 200 else ("", "", response.text)
        if text != f"I am {model}.":
            self.failed.append(f"{response.status_code} {text}")
            return
        self.answered[model] += 1
        self.sides.setdefault(conversation, set()).add(model)
        if model in self.opinions:
            said = await http.post("/feedback", json={"id": id, "rating": self.opinions[model]})
            assert said.status_code == 200, said.text

    async def run(self, http: httpx.AsyncClient, name: int) -> None:
        for number in itertools.count():
            for stream in (True, False):
                await self.ask(http, f"{name}-{number}", stream)


def read(response: httpx.Response) -> tuple[str, str, str]:
    """Id, model and text of an answer of either kind; the text of a broken one is what there is of it."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        whole = response.json()
        return whole["id"], whole["model"], whole["choices"][0]["message"]["content"]
    chunks: list[dict[str, Any]] = [
        json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line.startswith("data: {")
    ]
    said = [chunk for chunk in chunks if "choices" in chunk]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in said)
    return said[0]["id"], said[0]["model"], text


@contextlib.asynccontextmanager
async def asking(box: Box, key: str, **opinions: api.Rating) -> AsyncIterator[Clients]:
    """Clients that ask for as long as this lasts."""
    endpoint = (await box.client.status()).endpoint
    clients = Clients(opinions)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=30) as http:
        tasks = [asyncio.create_task(clients.run(http, name)) for name in range(CLIENTS)]
        try:
            yield clients
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error for error in outcomes if not isinstance(error, asyncio.CancelledError)] == []


async def test_a_good_canary_goes_live_and_nobody_notices(running: Box, key: str) -> None:
    async with asking(running, key) as clients:
        await running.client.promote("new", canary=0.2)
        canary = await ended(running)
        await running.until_answers("new")
        await asyncio.sleep(0.5)
    assert canary.outcome == "promoted", canary
    assert clients.failed == []
    live, candidate = canary.figures
    assert candidate.requests >= 40
    assert 0.1 < candidate.requests / (live.requests + candidate.requests) < 0.35
    assert (await running.client.rollback()).id == "old"
    await running.until_answers("old")


@pytest.mark.parametrize("behaviour", ["refuse", "die", "cut"])
async def test_a_bad_canary_goes_back_and_nobody_notices(running: Box, key: str, behaviour: str) -> None:
    (running.home.root / "new.behaviour").write_text(behaviour)
    async with asking(running, key) as clients:
        await running.client.promote("new", canary=0.2)
        canary = await ended(running)
        await asyncio.sleep(0.5)
    assert canary.outcome == "rolled back", canary
    assert ("cut by the length limit" if behaviour == "cut" else "failed") in canary.reason
    assert clients.failed == []
    assert clients.answered["old"] > 0
    if behaviour != "cut":
        assert clients.answered["new"] == 0
    status = await running.client.status()
    assert (status.live, status.routed, status.canary) == ("old", "old", None)


async def test_a_canary_whose_answers_people_dislike_goes_back(running: Box, key: str) -> None:
    async with asking(running, key, old="good", new="bad") as clients:
        await running.client.promote("new", canary=0.2)
        canary = await ended(running)
    assert canary.outcome == "rolled back", canary
    assert "ratings of its answers are bad" in canary.reason
    live, candidate = canary.figures
    assert (set(live.ratings), set(candidate.ratings)) == ({"good"}, {"bad"})
    assert clients.failed == []


async def test_a_canary_whose_streams_break_goes_back(running: Box, key: str) -> None:
    (running.home.root / "new.behaviour").write_text("break")
    async with asking(running, key) as clients:
        await running.client.promote("new", canary=0.2)
        canary = await ended(running)
        before = len(clients.failed)
        await asyncio.sleep(1)
    assert canary.outcome == "rolled back", canary
    assert 2 <= canary.figures[1].errors <= len(clients.failed), "each of these a client has seen"
    assert len(clients.failed) - before <= CLIENTS, "only what was under way"


async def test_a_canary_outlasts_kill_9_of_the_daemon(running: Box, key: str) -> None:
    await running.client.promote("new", canary=0.2)

    async def at_work() -> bool:
        present = (await running.client.status()).canary
        return present is not None and present.reason.startswith("waits for more requests")

    await running.until("the canary's engine", at_work, 60)
    async with asking(running, key) as clients:
        while clients.answered["new"] < 5:
            await asyncio.sleep(0.05)
    engine = running.pid("engine", "new")
    running.kill_daemon()
    running.start()
    await running.until_answers("old")
    await running.until("the canary again", at_work, 60)
    assert running.pid("engine", "new") == engine
    async with asking(running, key) as again:
        assert (await ended(running)).outcome == "promoted"
        await running.until_answers("new")
    assert again.failed == []
    moved = [name for name, sides in clients.sides.items() if len(sides | again.sides.get(name, sides)) > 1]
    assert moved == [], "conversations stay on their side"
