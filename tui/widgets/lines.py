"""Any number of lines, of which only those in sight are drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip
from textual.style import Style
from textual.visual import Visual


class VirtualLines(ScrollView, can_focus=True):
    """Lines that a subclass makes when they come into sight; no line wraps."""

    DEFAULT_CSS = """
    VirtualLines { scrollbar-size: 1 1; text-wrap: nowrap; }
    """

    def line(self, index: int) -> Content:
        """The line `index`, which is below the virtual height."""
        raise NotImplementedError

    def line_style(self, index: int) -> Style:
        return self.visual_style

    def render_line(self, y: int) -> Strip:
        scroll_x, scroll_y = self.scroll_offset
        index, width = scroll_y + y, self.size.width
        if index >= self.virtual_size.height:
            return Strip.blank(width, self.rich_style)
        content, style = self.line(index), self.line_style(index)
        if self.text_selection and (span := self.text_selection.get_span(index)):
            selected = Style.from_styles(self.screen.get_component_styles("screen--selection"))
            content = content.stylize(selected, span[0], None if span[1] == -1 else span[1])
        strips = Visual.to_strips(self, content, max(1, content.cell_length), 1, style, apply_selection=False)
        strip = strips[0] if strips else Strip.blank(0)
        return strip.crop_extend(scroll_x, scroll_x + width, style.rich_style).apply_offsets(scroll_x, index)


class Lines(VirtualLines):
    """The last `most` lines of a text that grows; the end stays in sight until one scrolls away from it."""

    DEFAULT_CSS = """
    Lines { overflow-y: scroll; }
    """
    ALLOW_SELECT = True
    BINDING_GROUP_TITLE = "Log and events"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "scroll_down", "Down", show=False, id="lines.down"),
        Binding("up,k", "scroll_up", "Up", show=False, id="lines.up"),
        Binding("home,g", "scroll_home", "First line", show=False, id="lines.first"),
        Binding("end,G", "scroll_end", "Last line, and follow", show=False, id="lines.last"),
    ]

    def __init__(self, most: int = 5000, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._most = most
        self._lines: deque[Content] = deque(maxlen=most)
        self._tail = Content("")
        self._following = True

    @property
    def text(self) -> str:
        return "\n".join(line.plain for line in (*self._lines, *([self._tail] if self._tail else [])))

    def append(self, lines: Iterable[Content], tail: Content | None = None) -> None:
        """Add lines, and replace the unfinished line below them by `tail`."""
        added = list(lines)
        if not added and (tail or Content("")).is_same(self._tail):
            return
        dropped = max(0, len(self._lines) + len(added) - self._most)
        self._lines.extend(added)
        self._tail = tail or Content("")
        width = max((line.cell_length for line in (*added, self._tail)), default=0)
        self._grow(Size(max(width, self.virtual_size.width), len(self._lines) + bool(self._tail)))
        if self._following:
            self._to_end()
        elif dropped:
            self.scroll_to(y=max(0, self.scroll_offset.y - dropped), animate=False, immediate=True)
        self.refresh()

    def _grow(self, size: Size) -> None:
        """Set the virtual size. Growing in height only needs no layout, which would paint the whole screen anew."""
        if size.width != self.virtual_size.width:
            self.virtual_size = size
        else:
            self.set_reactive(Lines.virtual_size, size)
            self.vertical_scrollbar.window_virtual_size = size.height

    def clear(self) -> None:
        self._lines.clear()
        self._tail = Content("")
        self._following = True
        self.virtual_size = Size(0, 0)
        self.scroll_home(animate=False, immediate=True)
        self.refresh()

    def line(self, index: int) -> Content:
        return self._lines[index] if index < len(self._lines) else self._tail

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        return selection.extract(self.text), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self._following = self.is_vertical_scroll_end

    def on_resize(self) -> None:
        if self._following:
            self._to_end()

    def _to_end(self) -> None:
        self.scroll_end(animate=False, immediate=True, x_axis=False)
