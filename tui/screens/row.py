"""One whole row of a dataset."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from tui.viewmodels.outline import row_text
from tui.widgets.text_pane import TextPane


class RowScreen(ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "dismiss", "Close", id="row.close"),
    ]

    def __init__(self, index: int, row: dict[str, Any]) -> None:
        super().__init__()
        self._index, self._row = index, row

    def compose(self) -> ComposeResult:
        pane = TextPane(id="dialog")
        pane.add_class("-tall")
        pane.border_title = f"Row {self._index + 1:,}"
        pane.border_subtitle = "esc closes"
        yield pane

    def on_mount(self) -> None:
        self.query_one(TextPane).show(row_text(self._row))
