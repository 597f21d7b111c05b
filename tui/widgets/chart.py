"""The loss curves of a run."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from tui.viewmodels.curves import loss_plot
from tui.viewmodels.styles import MUTED
from tui.viewmodels.trace import RunTrace

REDRAW_SECONDS = 1.0


class Chart(Widget, can_focus=True):
    """Draws a run's trace anew at most once a second, however often it grows."""

    DEFAULT_CSS = """
    Chart { height: 1fr; text-wrap: nowrap; }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.trace = RunTrace()
        self._drawn_seq = 0

    def on_mount(self) -> None:
        self.set_interval(REDRAW_SECONDS, self._redraw_if_grown)

    def show(self, trace: RunTrace) -> None:
        """Draw another run's trace from now on."""
        self.trace = trace
        self.refresh()

    def render(self) -> Content:
        self._drawn_seq = self.trace.seq
        picture = loss_plot(self.trace, self.size.width, self.size.height)
        if picture:
            return picture
        words = "no step has been taken yet" if self.size.height >= 6 else "too small for a curve"
        return Content.styled(words, MUTED)

    def _redraw_if_grown(self) -> None:
        if self.trace.seq != self._drawn_seq and self.screen.is_current:
            self.refresh()
