"""What the pages have in common: header, body and footer; on most, a list of records beside the chosen one."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Footer, Static

from tui.dashboard import Dashboard
from tui.viewmodels.box import Box
from tui.widgets.header import Header
from tui.widgets.panes import Panes
from tui.widgets.record_list import RecordList


class Page(Screen[None]):
    """One page of the dashboard."""

    BINDING_GROUP_TITLE = "This page"
    NAME: ClassVar[str]
    """The mode of the app that shows this page."""
    LABEL: ClassVar[str]
    ABOUT: ClassVar[str]
    """What is seen here and what it means, for the help."""

    @property
    def appliance(self) -> Dashboard:
        return cast(Dashboard, self.app)

    def compose(self) -> ComposeResult:
        yield Header(self.appliance.page_labels, self.NAME)
        yield from self.compose_body()
        yield Footer(show_command_palette=False)

    @abstractmethod
    def compose_body(self) -> ComposeResult: ...

    @abstractmethod
    def show_box(self, box: Box) -> None:
        """Show the newest state of the box."""

    def on_mount(self) -> None:
        self.watch(self.app, "box", self._show_news)
        self.watch(self.app, "link", self._show_news, init=False)

    def on_resize(self) -> None:
        self.call_after_refresh(self._show_news)
        self.call_after_refresh(self.refresh_bindings)

    def _show_news(self) -> None:
        box, link = self.appliance.box, self.appliance.link
        self.query_one(Header).show(box, link)
        self.set_class(bool(link.failures), "-stale")
        if box:
            self.show_box(box)


class RecordPage(Page):
    """A list of records and a view of the chosen one: side by side, or where it is narrow one in place of the other."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open", id="record.open"),
        Binding("escape", "close", "Back", id="record.close"),
    ]
    EMPTY: ClassVar[str]
    """What to do where there is no record yet."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: str | None = None
        self._wanted: str | None = None

    def compose_body(self) -> ComposeResult:
        with Horizontal(id="body"):
            with Vertical(id="side"):
                yield RecordList(id="list", markup=False)
                yield Static(self.EMPTY, id="empty", markup=False)
            with Vertical(id="detail"):
                yield from self.compose_detail()

    @abstractmethod
    def compose_detail(self) -> ComposeResult: ...

    @abstractmethod
    def entries(self, box: Box) -> list[tuple[str, Content]]:
        """The list: ids and what is shown of each."""

    @abstractmethod
    def show_record(self, box: Box, id: str) -> None:
        """Show the record `id` as it is now."""

    def show_box(self, box: Box) -> None:
        records = self.query_one(RecordList)
        entries = self.entries(box)
        self.set_class(not entries, "-empty")
        records.show(entries)
        if self._wanted in {id for id, _ in entries}:
            records.choose(str(self._wanted))
            self._wanted = None
        if self.chosen in {id for id, _ in entries}:
            self.show_record(box, self.chosen)

    def open(self, id: str) -> None:
        """Choose the record `id` and open it, now or as soon as it is in the list."""
        self._wanted = id
        self._show_news()
        self.action_open()

    @on(RecordList.OptionHighlighted, "#list")
    def _choose(self, message: RecordList.OptionHighlighted) -> None:
        if message.option_id != self.chosen and self.appliance.box and message.option_id:
            self.chosen = message.option_id
            self.show_record(self.appliance.box, message.option_id)

    @on(RecordList.OptionSelected, "#list")
    def action_open(self) -> None:
        self.add_class("-open")
        self.refresh_bindings()
        self.query_one(Panes).focus_present()

    def action_close(self) -> None:
        self.remove_class("-open")
        self.refresh_bindings()
        self.query_one(RecordList).focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "open":
            return self.has_class("-narrow") and not self.has_class("-open")
        return action != "close" or self.has_class("-open")
