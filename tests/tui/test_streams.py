"""Reading what a run says, over breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_daemon import FakeDaemon

from appliance.client import Client
from appliance.errors import InvalidInput, NotFound
from tui.link import Alarm, Link, backoff
from tui.streams import run_events, run_log


@pytest.fixture
async def client(daemon: FakeDaemon) -> AsyncIterator[Client]:
    async with Client(daemon.socket) as client:
        yield client


async def collect(stream: AsyncIterator[Any], into: list[Any]) -> None:
    async for item in stream:
        into.append(item)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_ended_run_is_read_once_and_whole(daemon: FakeDaemon, client: Client) -> None:
    portions: list[list[dict[str, Any]]] = []
    async with asyncio.timeout(60):
        await collect(run_events(client, "facts-2", 0, Alarm()), portions)
        pieces: list[str] = []
        await collect(run_log(client, "facts-2", 0, Alarm()), pieces)
    assert [event for portion in portions for event in portion] == daemon.events["facts-2"]
    assert len(portions) == 1
    assert "".join(pieces) == daemon.logs["facts-2"]


async def test_events_go_on_after_the_daemon_came_back(daemon: FakeDaemon, client: Client) -> None:
    portions: list[list[dict[str, Any]]] = []
    known = len(daemon.events["facts-3"])
    reading = asyncio.create_task(collect(run_events(client, "facts-3", known, Alarm()), portions))
    await daemon.emit("facts-3", "warning", "dpo", message="one")
    await until(lambda: len(portions) == 1)
    await daemon.stop()
    await daemon.emit("facts-3", "warning", "dpo", message="two")
    await daemon.start()
    await until(lambda: len(portions) == 2)
    await daemon.emit("facts-3", "warning", "dpo", message="three")
    daemon.runs["facts-3"]["state"] = "finished"
    await daemon.announce()
    await asyncio.wait_for(reading, 60)
    assert [event["message"] for portion in portions for event in portion] == ["one", "two", "three"]


async def test_log_goes_on_where_it_was_also_within_a_piece(daemon: FakeDaemon, client: Client) -> None:
    pieces: list[str] = []
    daemon.logs["facts-3"] = "first\nsec"
    reading = asyncio.create_task(collect(run_log(client, "facts-3", 3, Alarm()), pieces))
    await until(lambda: pieces == ["st\nsec"])
    await daemon.stop()
    daemon.logs["facts-3"] += "ond\n"
    await daemon.start()
    await until(lambda: "".join(pieces) == "st\nsecond\n")
    daemon.runs["facts-3"]["state"] = "finished"
    await daemon.announce()
    await asyncio.wait_for(reading, 60)


async def test_alarm_ends_the_wait_for_a_daemon(
    daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr("tui.streams.backoff", lambda failures: waits.append(failures) or 600)
    await daemon.stop()
    portions: list[Any] = []
    alarm = Alarm()
    reading = asyncio.create_task(collect(run_events(client, "facts-2", 0, alarm), portions))
    await until(lambda: waits == [1])
    await daemon.start()
    alarm.ring()
    await asyncio.wait_for(reading, 60)
    assert portions


async def test_unusual_line_ends_in_a_text_do_no_harm(daemon: FakeDaemon, client: Client) -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\rf\ng"
    daemon.runs["facts-3"]["state"] = "finished"
    daemon.logs["facts-3"] = odd
    known = len(daemon.events["facts-3"])
    await daemon.emit("facts-3", "warning", "dpo", message=odd)
    assert [event["message"] async for event in client.follow("facts-3", known)] == [odd]
    assert [piece async for piece in client.follow_log("facts-3")] == [odd]


async def test_what_the_daemon_reports_is_raised(client: Client) -> None:
    with pytest.raises(NotFound, match="no run 'gone'"):
        await collect(run_events(client, "gone", 0, Alarm()), [])


def test_backoff_doubles_and_is_capped() -> None:
    waits = [backoff(failures) for failures in range(1, 12)]
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert waits[-1] == max(waits) == 15.0


def test_link_counts_failures_and_says_what_is_wrong() -> None:
    link = Link(connected=True).lost(InvalidInput("code", "it broke", "mend it")).lost(ValueError("no JSON"))
    assert (link.connected, link.failures) == (False, 2)
    assert link.problem.startswith("the daemon speaks another version")
