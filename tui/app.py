"""The terminal dashboard: a client of the daemon that shows what is and changes nothing by coming or going."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.reactive import var
from textual.screen import Screen
from textual.system_commands import SystemCommandsProvider

from appliance.client import Client
from tui.commands import ApplianceCommands, key_sections
from tui.link import PROBLEMS, Alarm, Link, backoff, explain
from tui.messages import BoxRead, LinkLost
from tui.screens.chat import ChatPage
from tui.screens.confirm import Confirm
from tui.screens.data import DataPage
from tui.screens.help import HelpScreen
from tui.screens.page import Page, RecordPage
from tui.screens.recipes import RecipesPage
from tui.screens.releases import ReleasesPage
from tui.screens.runs import RunsPage
from tui.terminal import AsciiFilter, leave_with_terminal, only_ascii
from tui.theme import APPLIANCE
from tui.viewmodels.box import Box

T = TypeVar("T")

_POLL_SECONDS = 2.0
_PAGES: tuple[type[Page], ...] = (RunsPage, RecipesPage, ReleasesPage, ChatPage, DataPage)


def run(socket: Path) -> int:
    """Show the dashboard of the daemon on `socket` until it is quit. Returns the exit status."""
    app = ApplianceApp(Client(socket))
    app.run()
    return app.return_code or 0


class ApplianceApp(App[None]):
    """Reads the box every two seconds and whenever something was done; pages show what was read last."""

    TITLE = "appliance"
    CSS_PATH = "app.tcss"
    BINDING_GROUP_TITLE = "Everywhere"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - the type is Textual's
    MODES = {page.NAME: page for page in _PAGES}  # noqa: RUF012
    DEFAULT_MODE = RunsPage.NAME
    COMMANDS = {ApplianceCommands, SystemCommandsProvider}  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"app.page('{page.NAME}')", page.LABEL, show=False, id=f"page.{page.NAME}")
            for number, page in enumerate(_PAGES, 1)
        ),
        Binding("ctrl+r", "retry", "Try again", tooltip="Ask the daemon at once", show=False, id="app.retry"),
        Binding("question_mark,f1", "help", "Help", id="app.help"),
        Binding("q", "quit", "Quit", tooltip="Runs and the endpoint go on", id="app.quit"),
        Binding("ctrl+q", "quit", "Quit", show=False, priority=True, id="app.quit_anywhere"),
        Binding("ctrl+p", "command_palette", "Commands", key_display="^p", priority=True, id="app.palette"),
    ]

    box: var[Box | None] = var(None)
    link: var[Link] = var(Link())

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client = client
        self.alarm = Alarm()
        self.page_labels = {page.NAME: page.LABEL for page in _PAGES}
        self._ascii = [AsciiFilter()] if only_ascii(os.environ) else []
        self.register_theme(APPLIANCE)
        if "TEXTUAL_THEME" not in os.environ:
            self.theme = APPLIANCE.name
        if "SSH_CONNECTION" in os.environ:
            self.animation_level = "none"

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), *self._ascii]

    def on_mount(self) -> None:
        if not self.is_headless and sys.__stdin__:
            leave_with_terminal(self.exit, sys.__stdin__.fileno())
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
        if isinstance(self.screen, RecordPage):
            self.screen.open(id)

    async def action_page(self, page: str) -> None:
        await self.switch_mode(page)

    def action_retry(self) -> None:
        self.alarm.ring()

    def action_help(self) -> None:
        page = self.screen
        if isinstance(page, Page):
            self.push_screen(HelpScreen(page.LABEL, page.ABOUT, key_sections(self)))

    async def action_quit(self) -> None:
        running = bool(self.box and self.box.status.running)
        self.exit(message="The run goes on. `appliance` brings the dashboard back." if running else None)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        yield SystemCommand("app: Theme", "Choose the colours", self.action_change_theme)
        yield SystemCommand("app: Save a picture", "Save what is seen as SVG", self.deliver_screenshot)


async def _box(client: Client) -> Box:
    status, runs, releases, datasets, recipes = await asyncio.gather(
        client.status(), client.runs(), client.releases(), client.datasets(), client.recipes()
    )
    return Box(status, tuple(runs), tuple(releases), tuple(datasets), tuple(recipes))
