"""Curves as text: two by four braille dots a cell, marks, a y axis on the left and an x axis below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from textual.content import Content

from tui.viewmodels.styles import FAINT, MUTED

Point = tuple[float, float]

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BRAILLE = 0x2800


@dataclass(frozen=True)
class Layer:
    """Points drawn alike. A point that is not `drawable` leaves a gap. Later layers cover earlier ones."""

    kind: Literal["line", "dots", "marks"]
    style: str
    parts: Sequence[Sequence[Point]]
    """Rows of points by rising x; no line joins one to the next."""
    mark: str = "◆"


@dataclass(frozen=True)
class Boundary:
    """A vertical line where something begins."""

    x: float
    label: str


def drawable(y: float) -> bool:
    """Whether `y` has a place on an axis: it is a number, and not beyond all measure."""
    return abs(y) < 1e100


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over a tenth of the points, free of the pull towards zero at the start."""
    alpha = 2 / (max(1.0, len(points) / 10) + 1)
    total = weight = 0.0
    averaged = []
    for x, y in points:
        if not drawable(y):
            averaged.append((x, y))
            continue
        total = total * (1 - alpha) + alpha * y
        weight = weight * (1 - alpha) + alpha
        averaged.append((x, total / weight))
    return averaged


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values from `low` to `high`, about `count` of them."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(
    width: int, height: int, layers: Sequence[Layer], boundaries: Sequence[Boundary] = (), end: float = 0
) -> Content | None:
    """The layers in `width` x `height` cells, x from 0 to at least `end`. None where nothing can be drawn."""
    finite = [(x, y) for layer in layers for part in layer.parts for x, y in part if drawable(y)]
    if not finite or width < 16 or height < 5:
        return None
    right = max(end, max(x for x, _ in finite), 1.0)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    margin = (high - low or abs(high)) * 0.06 or 1.0
    low, high = low - margin, high + margin
    y_ticks = ticks(low, high, max(2, (height - 2) // 3))
    labels = [_label(value, y_ticks) for value in y_ticks]
    gutter = max(map(len, labels)) + 2
    canvas = _Canvas(width - gutter, height - 2, right, low, high)
    for boundary in boundaries:
        canvas.rule(boundary.x)
    for layer in layers:
        canvas.draw(layer)
    for boundary in boundaries:
        canvas.label(boundary)
    left = {canvas.row(value): label for value, label in zip(y_ticks, labels, strict=True)}
    lines = []
    for row, cells in enumerate(canvas.rows()):
        label = left.get(row)
        axis = (f"{label:>{gutter - 2}} ", "┤") if label else (" " * (gutter - 1), "│")
        lines.append(Content.assemble((axis[0], MUTED), (axis[1], FAINT), *cells))
    lines += _x_axis(gutter, canvas, right)
    return Content("\n").join(lines)


class _Canvas:
    """Cells of a picture: a character or a mask of braille dots, and a style."""

    def __init__(self, width: int, height: int, right: float, low: float, high: float) -> None:
        self.width, self.height = width, height
        self._right, self._low, self._high = right, low, high
        self._cells: dict[tuple[int, int], tuple[str, str]] = {}
        self._masks: dict[tuple[int, int], tuple[int, str]] = {}

    def column(self, x: float) -> int:
        return min(self.width - 1, self._dot_x(x) // 2)

    def row(self, y: float) -> int:
        return self._dot_y(y) // 4

    def rule(self, x: float) -> None:
        column = self.column(x)
        for row in range(self.height) if column else ():
            self._cells[row, column] = ("┊", FAINT)

    def label(self, boundary: Boundary) -> None:
        """Write the label beside its line, in the highest row where it covers nothing."""
        start = self.column(boundary.x) + 1
        columns = range(start, start + len(boundary.label))
        if columns.stop > self.width:
            return
        for row in range(self.height):
            if not any((row, column) in self._masks or (row, column) in self._cells for column in columns):
                cells = zip(columns, boundary.label, strict=True)
                self._cells |= {(row, column): (character, MUTED) for column, character in cells}
                return

    def draw(self, layer: Layer) -> None:
        layer_masks: dict[tuple[int, int], int] = {}
        for part in layer.parts:
            if layer.kind == "marks":
                for x, y in part:
                    if drawable(y):
                        self._masks.pop((self.row(y), self.column(x)), None)
                        self._cells[self.row(y), self.column(x)] = (layer.mark, layer.style)
                continue
            for dot_x, dot_y in self._dots(part, joined=layer.kind == "line"):
                for y in (dot_y, dot_y + 1) if layer.kind == "line" else (dot_y,):
                    cell = y // 4, dot_x // 2
                    layer_masks[cell] = layer_masks.get(cell, 0) | _DOTS[y % 4][dot_x % 2]
        for cell, mask in layer_masks.items():
            self._masks[cell] = (mask, layer.style)

    def rows(self) -> Iterator[list[tuple[str, str]]]:
        """Each row as stretches of one style."""
        for row in range(self.height):
            stretches: list[tuple[str, str]] = []
            for column in range(self.width):
                mask, style = self._masks.get((row, column), (0, ""))
                text, style = (chr(_BRAILLE + mask), style) if mask else self._cells.get((row, column), (" ", ""))
                if stretches and stretches[-1][1] == style:
                    stretches[-1] = (stretches[-1][0] + text, style)
                else:
                    stretches.append((text, style))
            yield stretches

    def _dots(self, points: Sequence[Point], joined: bool) -> Iterator[tuple[int, int]]:
        """The dots of a row of points. All points of one dot column become the stretch that they span."""
        previous: tuple[int, int] | None = None
        for column in self._by_column(points):
            if column is None:
                previous = None
                continue
            x, first, last, top, bottom = column
            if joined and previous:
                yield from _segment(*previous, x, first)
            for y in range(top, bottom + 1):
                yield x, y
            previous = (x, last)

    def _by_column(self, points: Sequence[Point]) -> Iterator[tuple[int, int, int, int, int] | None]:
        """(x, first y, last y, top, bottom) of each dot column, None for a gap."""
        column: tuple[int, int, int, int, int] | None = None
        for x, y in points:
            if not drawable(y):
                if column:
                    yield column
                column = None
                yield None
                continue
            dot_x, dot_y = self._dot_x(x), self._dot_y(y)
            if column and column[0] == dot_x:
                _, first, _, top, bottom = column
                column = (dot_x, first, dot_y, min(top, dot_y), max(bottom, dot_y))
            else:
                if column:
                    yield column
                column = (dot_x, dot_y, dot_y, dot_y, dot_y)
        if column:
            yield column

    def _dot_x(self, x: float) -> int:
        return round(min(max(x / self._right, 0), 1) * (2 * self.width - 1))

    def _dot_y(self, y: float) -> int:
        return round((self._high - y) / (self._high - self._low) * (4 * self.height - 1))


def _segment(x0: int, y0: int, x1: int, y1: int) -> Iterator[tuple[int, int]]:
    """The dots between two dots, both ends left out or included."""
    length = max(abs(x1 - x0), abs(y1 - y0))
    for index in range(1, length):
        yield x0 + round((x1 - x0) * index / length), y0 + round((y1 - y0) * index / length)


def _x_axis(gutter: int, canvas: _Canvas, right: float) -> list[Content]:
    line = ["─"] * canvas.width
    numbers = [" "] * canvas.width
    free = 0
    for value in ticks(0, right, max(2, canvas.width // 14)):
        column = canvas.column(value)
        label = _label(value, [0.0, 1.0]) if value == int(value) else ""
        start = min(max(0, column - len(label) // 2), canvas.width - len(label))
        if not label or start < free:
            continue
        line[column] = "┬"
        numbers[start : start + len(label)] = label
        free = start + len(label) + 1
    return [
        Content.styled(" " * (gutter - 1) + "└" + "".join(line), FAINT),
        Content.styled(" " * gutter + "".join(numbers), MUTED),
    ]


def _label(value: float, among: Sequence[float]) -> str:
    """`value` with the decimals that tell the ticks apart."""
    step = among[1] - among[0] if len(among) > 1 else abs(value) or 1.0
    if max(map(abs, among)) >= 1e5 or step < 1e-4:
        return f"{value:.1e}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != round(step, decimals + 1):
        decimals += 1
    return f"{value:.{decimals}f}"
