"""The list on the left of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option


class RecordList(OptionList):
    """Records by id; showing a newer state of them keeps the cursor on the same record."""

    BINDING_GROUP_TITLE = "List"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "cursor_down", "Next", show=False, id="list.down"),
        Binding("up,k", "cursor_up", "Previous", show=False, id="list.up"),
        Binding("home,g", "first", "First", show=False, id="list.first"),
        Binding("end,G", "last", "Last", show=False, id="list.last"),
    ]

    def show(self, records: Sequence[tuple[str, Content]]) -> None:
        """Show these records in this order."""
        if [id for id, _ in records] == [option.id for option in self.options]:
            for id, entry in records:
                if self.get_option(id).prompt != entry:
                    self.replace_option_prompt(id, entry)
            return
        kept = self.highlighted_option.id if self.highlighted_option else None
        offset = self.scroll_offset
        self.set_options(Option(entry, id=id) for id, entry in records)
        self.scroll_to(*offset, animate=False, immediate=True)
        if records:
            self.highlighted = next((index for index, (id, _) in enumerate(records) if id == kept), 0)

    def choose(self, id: str) -> None:
        """Move the cursor to the record `id`, if it is there."""
        for index, option in enumerate(self.options):
            if option.id == id:
                self.highlighted = index
