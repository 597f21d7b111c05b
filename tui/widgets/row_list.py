"""The rows of a dataset of any size, fetched a page at a time as they come into sight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.cache import LRUCache
from textual.content import Content
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.style import Style

from tui.viewmodels.outline import row_preview
from tui.viewmodels.styles import MUTED
from tui.widgets.lines import VirtualLines

PAGE = 50


class RowList(VirtualLines):
    """One line a row, with a cursor."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"row-list--cursor"}
    DEFAULT_CSS = """
    RowList { overflow-x: hidden; }
    RowList > .row-list--cursor { background: $primary 15%; }
    RowList:focus > .row-list--cursor { background: $primary 35%; }
    RowList:ansi > .row-list--cursor { background: transparent; text-style: reverse; }
    """
    BINDING_GROUP_TITLE = "Rows"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "move(1)", "Next row", show=False, id="rows.down"),
        Binding("up,k", "move(-1)", "Previous row", show=False, id="rows.up"),
        Binding("pagedown", "page(1)", "Next page", show=False, id="rows.page_down"),
        Binding("pageup", "page(-1)", "Previous page", show=False, id="rows.page_up"),
        Binding("home,g", "jump(0)", "First row", show=False, id="rows.first"),
        Binding("end,G", "jump(-1)", "Last row", show=False, id="rows.last"),
        Binding("enter", "open", "Whole row", id="rows.open"),
    ]

    cursor = reactive(0)

    @dataclass
    class PageWanted(Message):
        """Rows from `offset` on came into sight and are not here."""

        dataset: str
        offset: int

    @dataclass
    class RowOpened(Message):
        index: int
        row: dict[str, Any]

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._dataset = ""
        self._pages: LRUCache[int, Sequence[dict[str, Any]]] = LRUCache(40)
        self._asked: set[int] = set()

    def show(self, dataset: str, total: int) -> None:
        """Show the `total` rows of `dataset` from the first."""
        if dataset == self._dataset:
            return
        self._dataset = dataset
        self._pages.clear()
        self._asked.clear()
        self.virtual_size = Size(0, total)
        self.cursor = 0
        self.scroll_home(animate=False, immediate=True)
        self.refresh()

    def take(self, dataset: str, offset: int, rows: Sequence[dict[str, Any]]) -> None:
        """The rows that were wanted."""
        if dataset == self._dataset:
            self._pages[offset // PAGE] = rows
            self._asked.discard(offset // PAGE)
            self.refresh()

    def missed(self, dataset: str, offset: int) -> None:
        """The rows could not be had; they are asked for again when they are next drawn."""
        if dataset == self._dataset:
            self._asked.discard(offset // PAGE)

    def line(self, index: int) -> Content:
        number = (f"{index + 1:>{len(str(self.virtual_size.height))}}  ", MUTED)
        row = self._row(index)
        return Content.assemble(number, row_preview(row) if row else ("…", MUTED))

    def line_style(self, index: int) -> Style:
        return self.get_visual_style("row-list--cursor") if index == self.cursor else self.visual_style

    def validate_cursor(self, cursor: int) -> int:
        return max(0, min(cursor, self.virtual_size.height - 1))

    def watch_cursor(self, cursor: int) -> None:
        self.scroll_to_region(Region(0, cursor, 1, 1), animate=False, immediate=True, force=True)
        self.refresh()

    def action_move(self, rows: int) -> None:
        self.cursor += rows

    def action_page(self, pages: int) -> None:
        self.cursor += pages * max(1, self.size.height - 1)

    def action_jump(self, row: int) -> None:
        self.cursor = row if row >= 0 else self.virtual_size.height - 1

    def action_open(self) -> None:
        if row := self._row(self.cursor):
            self.post_message(self.RowOpened(self.cursor, row))

    def on_click(self, event: Any) -> None:
        self.cursor = self.scroll_offset.y + event.y

    def _row(self, index: int) -> dict[str, Any] | None:
        page = self._pages.get(index // PAGE)
        if page is not None:
            return page[index % PAGE] if index % PAGE < len(page) else None
        if index // PAGE not in self._asked:
            self._asked.add(index // PAGE)
            self.post_message(self.PageWanted(self._dataset, index // PAGE * PAGE))
        return None
