"""What one run says, read for as long as it runs: a break is waited out and reading goes on where it was."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from appliance.api import ACTIVE
from appliance.client import Client
from appliance.errors import Unreachable
from tui.link import Alarm, backoff

T = TypeVar("T")


async def run_events(client: Client, run: str, after: int, alarm: Alarm) -> AsyncIterator[list[dict[str, Any]]]:
    """The run's events with a seq above `after` in portions: first all that there are, then each as it comes.

    Ends when the run has ended. Raises the ApplianceError that the daemon reports.
    """
    seq = after

    async def read() -> AsyncIterator[list[dict[str, Any]]]:
        if known := await client.events(run, after=seq):
            yield known
        async for event in client.follow(run, after=seq):
            yield [event]

    async for portion in _until_ended(client, run, read, alarm):
        seq = portion[-1]["seq"]
        yield portion


async def run_log(client: Client, run: str, skip: int, alarm: Alarm) -> AsyncIterator[str]:
    """The run's log without its first `skip` characters, in pieces, as `run_events`."""
    shown = skip

    async def read() -> AsyncIterator[str]:
        position = 0
        async for piece in client.follow_log(run):
            known, position = shown - position, position + len(piece)
            if known < len(piece):
                yield piece[max(0, known) :]

    async for piece in _until_ended(client, run, read, alarm):
        shown += len(piece)
        yield piece


async def _until_ended(
    client: Client, run: str, read: Callable[[], AsyncIterator[T]], alarm: Alarm
) -> AsyncIterator[T]:
    """Items of `read`, called again after every break until the run is over and all has been read."""
    failures = 0
    while True:
        try:
            ended = (await client.run(run)).state not in ACTIVE
            async for item in read():
                failures = 0
                yield item
            if ended:
                return
        except Unreachable:
            failures += 1
        await alarm.sleep(backoff(failures))
