"""Figures and text as a person reads them in a terminal."""

from __future__ import annotations

import math
import re
from typing import Any

from textual.content import Content

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links, clipboard
    r"|\x1b[@-Z\\-_]"
)
# What would move the cursor, ring, or reorder the text around it.
_UNSAFE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def plain(text: str) -> str:
    """Text of unknown origin without terminal escapes and control characters; newlines stay, tabs become spaces."""
    return _ESCAPES.sub("", text).translate(_UNSAFE).expandtabs(4)


def one_line(text: str, limit: int = 200) -> str:
    """`plain` text on one line, at most `limit` characters."""
    line = " ".join(plain(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def fit(text: str, width: int) -> str:
    """`text` cut to `width` cells, with an ellipsis where something was cut."""
    return Content(text).truncate(max(width, 1), ellipsis=True).plain


def size(count: float) -> str:
    """Bytes in the unit that leaves one to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 86400}d {total % 86400 // 3600:02d}h"


def ago(then: float, now: float) -> str:
    """How long ago, in its largest unit."""
    seconds = max(0, int(now - then))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit} ago"
    return "just now"


def number(value: Any) -> str:
    """A figure with four significant digits, whatever was reported."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
