"""Several views of one record: all at once where it is wide, one at a time under their names where it is not."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.reactive import reactive
from textual.widget import Widget

from tui.widgets.tab import Tab


class Panes(Vertical):
    """Panes by title; app.tcss says which are in sight."""

    DEFAULT_CSS = """
    Panes {
        height: 1fr;
        .pane { height: 1fr; }
        #views { height: 1; }
    }
    """
    BINDING_GROUP_TITLE = "Views (narrow terminals)"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right_square_bracket", "turn(1)", "View", key_display="]", id="panes.next"),
        Binding("left_square_bracket", "turn(-1)", "View before", show=False, key_display="[", id="panes.previous"),
    ]

    present = reactive(0)

    def __init__(self, panes: dict[str, Widget], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._panes = panes

    def compose(self) -> ComposeResult:
        if len(self._panes) > 1:
            with Horizontal(id="views"):
                for index, title in enumerate(self._panes):
                    yield Tab(title, partial(self.turn_to, index))
        for title, pane in self._panes.items():
            pane.add_class("pane")
            pane.border_title = title
            yield pane

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "turn" or (self.screen.has_class("-narrow") and len(self._panes) > 1)

    def watch_present(self, present: int) -> None:
        for group in (self.query(Tab), self._panes.values()):
            for index, widget in enumerate(group):
                widget.set_class(index == present, "-present")

    def action_turn(self, step: int) -> None:
        self.turn_to((self.present + step) % len(self._panes))

    def turn_to(self, index: int) -> None:
        """Bring a pane to sight and give it the keys."""
        self.present = index
        self.focus_present()

    def focus_present(self) -> None:
        """Give the keys to the pane in sight."""
        list(self._panes.values())[self.present].focus()
