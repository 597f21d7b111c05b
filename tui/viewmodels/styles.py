"""Styles of text that say the same thing everywhere. Names with a $ are the theme's."""

from __future__ import annotations

MUTED = "$foreground 55%"
"""Labels, and what is told in passing."""
FAINT = "$foreground 30%"
"""Axes, rules and what has yet to be."""
