"""The two lines on top of every page: where one is, the link to the daemon, and the box; below, what went wrong."""

from __future__ import annotations

from functools import partial

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content

from tui.link import Link
from tui.viewmodels.box import Box, status_line
from tui.viewmodels.styles import MUTED
from tui.widgets.tab import Tab
from tui.widgets.words import Words


class Header(Vertical):
    """Page names, link badge and status line; below them what is wrong with the link, and why another release is live
    than was to be."""

    DEFAULT_CSS = """
    Header {
        height: auto;
        Horizontal { height: 1; }
        #link { width: 1fr; height: 1; padding: 0 1; text-align: right; }
        #status { width: 1fr; height: 1; padding: 0 1; background: $surface; }
        #status { text-wrap: nowrap; text-overflow: ellipsis; }
        #problem, #setback { padding: 0 1; background: $error 20%; display: none; }
        #problem.-shown, #setback.-shown { display: block; }
    }
    """

    def __init__(self, pages: dict[str, str], page: str) -> None:
        super().__init__()
        self._pages, self._page = pages, page

    def compose(self) -> ComposeResult:
        with Horizontal():
            for number, (name, label) in enumerate(self._pages.items(), 1):
                chosen = partial(self.app.run_action, f"app.page('{name}')")
                yield Tab(f"{number} {label}", chosen, present=name == self._page)
            yield Words(id="link")
        yield Words(id="status")
        yield Words(id="problem")
        yield Words(id="setback")

    def show(self, box: Box | None, link: Link) -> None:
        width = (self.size.width or self.app.size.width) - 2
        words = status_line(box.status, width) if box else Content.styled("nothing known yet", MUTED)
        self.query_one("#link", Words).say(_badge(link))
        self.query_one("#status", Words).say(words)
        problem = self.query_one("#problem", Words)
        problem.say(Content.assemble(link.problem, ("  (ctrl+r tries at once)", MUTED)))
        problem.set_class(bool(link.failures), "-shown")
        setback = self.query_one("#setback", Words)
        setback.say(box.status.setback if box else "")
        setback.set_class(bool(box and box.status.setback), "-shown")


def _badge(link: Link) -> Content:
    if link.connected:
        return Content.styled("● connected", "$text-success")
    if link.failures:
        return Content.styled(f"○ reconnecting {link.failures}", "$text-warning")
    return Content.styled("○ connecting", MUTED)
