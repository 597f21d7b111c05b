"""One whole row of a dataset: what it says, and what of it is trained."""

from __future__ import annotations

from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen

from appliance.client import Client
from tui.link import PROBLEMS, explain
from tui.viewmodels.outline import row_text, trained_text
from tui.widgets.text_pane import TextPane


class RowScreen(ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "dismiss", "Close", id="row.close"),
        Binding("m", "mask", "Mask", id="row.mask"),
    ]

    def __init__(self, client: Client, dataset: str, index: int, row: dict[str, Any]) -> None:
        super().__init__()
        self._client, self._dataset, self._index, self._row = client, dataset, index, row
        self._masked = False

    def compose(self) -> ComposeResult:
        pane = TextPane(id="dialog")
        pane.add_class("-tall")
        pane.border_title = f"Row {self._index + 1:,}"
        yield pane

    def on_mount(self) -> None:
        self._show_row()

    def action_mask(self) -> None:
        """Turn between what the row says and what the base model is trained on."""
        self._masked = not self._masked
        if self._masked:
            pane = self.query_one(TextPane)
            pane.show(Content("rendering it …"))
            pane.border_subtitle = "m the row, esc closes"
            self._render_row()
        else:
            self._show_row()

    def _show_row(self) -> None:
        pane = self.query_one(TextPane)
        pane.show(row_text(self._row))
        pane.border_subtitle = "m what is trained, esc closes"

    @work(exclusive=True, exit_on_error=False)
    async def _render_row(self) -> None:
        try:
            (conversations,) = await self._client.rendered(self._dataset, offset=self._index)
            said = trained_text(conversations)
        except PROBLEMS as error:
            said = Content(explain(error))
        if self._masked:
            self.query_one(TextPane).show(said)
