"""Styles of text that say the same thing everywhere. Names with a $ are the theme's."""

from __future__ import annotations

from collections.abc import Iterable

from textual.content import Content

from appliance.words import Said, Tone

MUTED = "$foreground 55%"
"""Labels, and what is told in passing."""
FAINT = "$foreground 30%"
"""Axes, rules and what has yet to be."""
_TONES: dict[Tone, str] = {
    "": "",
    "muted": MUTED,
    "strong": "bold",
    "good": "$text-success",
    "bad": "$text-error",
    "warning": "$text-warning",
}


def spoken(said: Iterable[Said]) -> Content:
    """Pieces of a line in their colours."""
    return Content.assemble(*((piece.text, _TONES[piece.tone]) for piece in said))


def fit(text: str, width: int) -> str:
    """`text` cut to `width` cells, with an ellipsis where something was cut."""
    return Content(text).truncate(max(width, 1), ellipsis=True).plain
