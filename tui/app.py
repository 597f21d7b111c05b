"""The terminal dashboard: a client of the daemon that shows what is and changes nothing by coming or going."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.screen import Screen
from textual.system_commands import SystemCommandsProvider

from appliance.client import Client
from tui.commands import ApplianceCommands, key_sections
from tui.dashboard import Dashboard
from tui.screens.chat import ChatPage
from tui.screens.data import DataPage
from tui.screens.help import HelpScreen
from tui.screens.page import Page
from tui.screens.recipes import RecipesPage
from tui.screens.releases import ReleasesPage
from tui.screens.runs import RunsPage
from tui.terminal import AsciiFilter, leave_with_terminal, only_ascii
from tui.theme import APPLIANCE

_PAGES: tuple[type[Page], ...] = (RunsPage, RecipesPage, ReleasesPage, ChatPage, DataPage)


def run(socket: Path) -> int:
    """Show the dashboard of the daemon on `socket` until it is quit. Returns the exit status."""
    app = ApplianceApp(Client(socket))
    app.run()
    return app.return_code or 0


class ApplianceApp(Dashboard):
    """The dashboard with its pages, keys and looks."""

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

    def __init__(self, client: Client) -> None:
        super().__init__(client, {page.NAME: page.LABEL for page in _PAGES})
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
