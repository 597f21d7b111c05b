"""The head of a run's view."""

from __future__ import annotations

import time

from textual.content import Content
from textual.geometry import Size
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
        self._drawn = Content("")

    def show(self, run: api.Run | None, trace: RunTrace) -> None:
        """Show this run; what has changed is drawn, and only what needs more lines moves the rest."""
        self._shown = (run, trace) if run else None
        self.show_changes()

    def show_changes(self) -> None:
        before, now = self._drawn.plain, self.render().plain
        if before != now:
            self.refresh(layout=before.count("\n") != now.count("\n"))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self._content(width).get_height({}, width)

    def render(self) -> Content:
        self._drawn = self._content(self.size.width)
        return self._drawn

    def _content(self, width: int) -> Content:
        return run_summary(*self._shown, width, time.time()) if self._shown else Content("")
