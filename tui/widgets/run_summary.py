"""The head of a run's view."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from appliance import api
from tui.viewmodels.summary import run_summary
from tui.viewmodels.trace import RunTrace


class RunSummary(Widget):
    """State, stages, progress and figures of one run."""

    DEFAULT_CSS = """
    RunSummary { height: auto; max-height: 9; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._shown: tuple[api.Run, RunTrace] | None = None

    def show(self, run: api.Run | None, trace: RunTrace) -> None:
        shown = (run, trace) if run else None
        if shown != self._shown:
            self._shown = shown
            self.refresh(layout=True)

    def render(self) -> Content:
        return run_summary(*self._shown, self.size.width) if self._shown else Content("")
