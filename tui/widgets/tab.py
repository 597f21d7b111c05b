"""A name that can be clicked: of a page, or of a view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textual.widgets import Static


class Tab(Static):
    """`present` is the one in sight; that is shown in reverse video."""

    DEFAULT_CSS = """
    Tab { width: auto; height: 1; color: $foreground 60%; pointer: pointer; }
    Tab:hover { color: $foreground; }
    Tab.-present { color: $primary; text-style: bold reverse; }
    """

    def __init__(self, label: str, chosen: Callable[[], Any], present: bool = False) -> None:
        super().__init__(f" {label} ", markup=False)
        self._chosen = chosen
        self.set_class(present, "-present")

    async def on_click(self) -> None:
        self.call_next(self._chosen)
