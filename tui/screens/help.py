"""What is seen on a page, and every key that works there."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen

from tui.commands import KeySection
from tui.widgets.text_pane import TextPane


class HelpScreen(ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,f1", "dismiss", "Close", id="help.close"),
    ]

    def __init__(self, title: str, about: str, sections: list[KeySection]) -> None:
        super().__init__()
        self._title, self._content = title, _help(about, sections)

    @property
    def text(self) -> str:
        return self._content.plain

    def compose(self) -> ComposeResult:
        pane = TextPane(id="dialog")
        pane.add_class("-tall")
        pane.border_title = self._title
        pane.border_subtitle = "esc closes"
        yield pane

    def on_mount(self) -> None:
        self.query_one(TextPane).show(self._content)


def _help(about: str, sections: list[KeySection]) -> Content:
    lines = [Content(about)]
    for section in sections:
        lines += [Content(""), Content.styled(section.title, "bold $text-accent")]
        for keys, binding in section.keys:
            told = f"{binding.description}. {binding.tooltip}" if binding.tooltip else binding.description
            lines.append(Content.assemble((f"  {keys:<12}", "bold"), told))
    return Content("\n").join(lines)
