"""Text that scrolls."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content

from tui.widgets.words import Words


class TextPane(VerticalScroll):
    """Shows wrapped text; the keys scroll it."""

    BINDING_GROUP_TITLE = "Text"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "scroll_down", "Down", show=False, id="text.down"),
        Binding("up,k", "scroll_up", "Up", show=False, id="text.up"),
        Binding("home,g", "scroll_home", "Top", show=False, id="text.top"),
        Binding("end,G", "scroll_end", "End", show=False, id="text.end"),
    ]

    def compose(self) -> ComposeResult:
        yield Words()

    def show(self, content: Content) -> None:
        """Show `content` instead of what was there."""
        self.query_one(Words).say(content)
