"""What every page of the dashboard leans on: the box as it was read last, the link, and doing and telling things."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar, runtime_checkable

from textual import work
from textual.app import App
from textual.reactive import var

from appliance.client import Client
from tui.link import PROBLEMS, Alarm, Link, backoff, explain
from tui.messages import BoxRead, LinkLost
from tui.screens.confirm import Confirm
from tui.viewmodels.box import Box

T = TypeVar("T")

_POLL_SECONDS = 2.0


@runtime_checkable
class OpensRecords(Protocol):
    """A page with records that can be opened by their id."""

    def open(self, id: str) -> None: ...


class Dashboard(App[None]):
    """Reads the box every two seconds and whenever something was done. `page_labels`: the pages by their names."""

    box: var[Box | None] = var(None)
    link: var[Link] = var(Link())

    def __init__(self, client: Client, page_labels: dict[str, str]) -> None:
        super().__init__()
        self.client = client
        self.page_labels = page_labels
        self.alarm = Alarm()

    def on_mount(self) -> None:
        self._read_box()

    async def on_unmount(self) -> None:
        await self.client.close()

    @work(exclusive=True, group="box", exit_on_error=False)
    async def _read_box(self) -> None:
        link = Link()
        while True:
            try:
                box = await _box(self.client)
            except PROBLEMS as error:
                link = link.lost(error)
                self.post_message(LinkLost(link))
                await self.alarm.sleep(backoff(link.failures))
            else:
                link = Link(connected=True)
                self.post_message(BoxRead(box))
                await self.alarm.sleep(_POLL_SECONDS)

    def on_box_read(self, message: BoxRead) -> None:
        back = not self.link.connected
        self.box = message.box
        self.link = Link(connected=True)
        if back:
            self.alarm.ring()

    def on_link_lost(self, message: LinkLost) -> None:
        self.link = message.link

    def refused(self, reason: str | None) -> bool:
        """Tell `reason`, if there is one, why an action cannot be done, and return whether there is."""
        if reason:
            self.notify(reason, title="Not now", severity="warning", markup=False)
        return bool(reason)

    def complain(self, error: Exception) -> None:
        """Tell an error and what to do about it."""
        self.notify(explain(error), severity="error", timeout=10, markup=False)

    def confirm(self, title: str, text: str, verb: str, then: Callable[[], object]) -> None:
        """Ask, and call `then` on a yes."""

        def answered(yes: bool | None) -> None:
            if yes:
                then()

        self.push_screen(Confirm(title, text, verb), answered)

    @work(group="actions", exit_on_error=False)
    async def perform(self, call: Coroutine[Any, Any, T], said: Callable[[T], str]) -> None:
        """Have the daemon do something; tell the result, or the error, and read the box at once."""
        try:
            result = await call
        except PROBLEMS as error:
            self.complain(error)
        else:
            self.notify(said(result), markup=False)
        self.alarm.ring()

    async def open_record(self, page: str, id: str) -> None:
        """Go to `page` and open the record `id` there."""
        await self.action_page(page)
        if isinstance(self.screen, OpensRecords):
            self.screen.open(id)

    async def action_page(self, page: str) -> None:
        await self.switch_mode(page)

    def action_retry(self) -> None:
        self.alarm.ring()


async def _box(client: Client) -> Box:
    status, runs, releases, datasets, recipes = await asyncio.gather(
        client.status(), client.runs(), client.releases(), client.datasets(), client.recipes()
    )
    return Box(status, tuple(runs), tuple(releases), tuple(datasets), tuple(recipes))
