"""Data: imported datasets, what became of every row of the source, and the rows themselves."""

from __future__ import annotations

from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.content import Content

from tui.link import PROBLEMS, explain
from tui.screens.page import RecordPage
from tui.screens.row import RowScreen
from tui.viewmodels.box import Box
from tui.viewmodels.outline import outline
from tui.viewmodels.records import dataset_entry
from tui.widgets.panes import Panes
from tui.widgets.row_list import PAGE, RowList
from tui.widgets.text_pane import TextPane


class DataPage(RecordPage):
    NAME = "data"
    LABEL = "Data"
    EMPTY = "No datasets yet.\n\nImport a file on a command line:\n\n  appliance data import FILE"
    ABOUT = (
        "A dataset is one import, named by the hash of its rows. The report says how many rows of the file were kept "
        "and which were dropped, with line numbers and reasons. Enter shows a whole row."
    )

    def __init__(self) -> None:
        super().__init__()
        self._reports: dict[str, dict[str, Any]] = {}

    def compose_detail(self) -> ComposeResult:
        yield Panes({"Report": TextPane(id="report"), "Rows": RowList(id="rows")})

    def entries(self, box: Box) -> list[tuple[str, Content]]:
        return [(dataset.id, dataset_entry(dataset)) for dataset in box.datasets]

    def show_record(self, box: Box, id: str) -> None:
        dataset = box.dataset(id)
        if dataset is None:
            return
        self.query_one(RowList).show(id, dataset.rows)
        report = self._reports.get(id)
        self.query_one(TextPane).show(outline(report) if report else Content("reading it …"))
        if report is None:
            self._read_report(id)

    @work(exclusive=True, group="report", exit_on_error=False)
    async def _read_report(self, id: str) -> None:
        try:
            report = await self.appliance.client.dataset(id)
            report.get("tokens", {}).pop("lengths", None)
            self._reports[id] = report
        except PROBLEMS as error:
            if id == self.chosen:
                self.query_one(TextPane).show(Content(explain(error)))
            return
        if id == self.chosen and self.appliance.box:
            self.show_record(self.appliance.box, id)

    @on(RowList.PageWanted)
    def _page_wanted(self, message: RowList.PageWanted) -> None:
        self._read_page(message.dataset, message.offset)

    @work(group="rows", exit_on_error=False)
    async def _read_page(self, dataset: str, offset: int) -> None:
        rows = self.query_one(RowList)
        try:
            page = await self.appliance.client.rows(dataset, offset, PAGE)
        except PROBLEMS as error:
            rows.missed(dataset, offset)
            self.appliance.complain(error)
        else:
            rows.take(dataset, offset, page.rows)

    @on(RowList.RowOpened)
    def _row_opened(self, message: RowList.RowOpened) -> None:
        if self.chosen is not None:
            self.app.push_screen(RowScreen(self.appliance.client, self.chosen, message.index, message.row))
