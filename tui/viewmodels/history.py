"""A run's events as lines of text."""

from __future__ import annotations

import time

from textual.content import Content

from appliance.words import event_words
from tui.viewmodels.styles import MUTED, spoken
from tui.viewmodels.trace import Event


def event_line(event: Event) -> Content | None:
    """One line about an event. None for a step: those are the curve."""
    if event["event"] == "step":
        return None
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    head = ((f"{clock} ", MUTED), (f"{event.get('stage', '')} ", "$text-primary"))
    return Content.assemble(*head, spoken(event_words(event)))
