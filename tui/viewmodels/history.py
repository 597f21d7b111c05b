"""A run's events as lines of text."""

from __future__ import annotations

import time
from typing import Any

from textual.content import Content

from tui.viewmodels import states
from tui.viewmodels.format import duration, number, one_line, size
from tui.viewmodels.styles import MUTED
from tui.viewmodels.trace import Event


def event_line(event: Event) -> Content | None:
    """One line about an event. None for a step: those are the curve."""
    told = _told(event)
    if told is None:
        return None
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return Content.assemble((f"{clock} ", MUTED), (f"{event.get('stage', '')} ", "$text-primary"), told)


def _told(event: Event) -> Content | None:
    match event["event"]:
        case "step":
            return None
        case "stage_started":
            return Content.styled("started", "bold")
        case "stage_finished":
            return Content.assemble(states.STAGE_DONE.label(), f" in {duration(event['seconds'])}")
        case "forecast":
            memory = f"{size(event['memory']['total'])} of {size(event['available'])} memory"
            return Content(f"takes {event['steps']} steps, about {duration(event['seconds'])}, {memory}")
        case "eval":
            low, high = event.get("interval") or (0, 0)
            spread = f" ± {number((high - low) / 2)}" if high > low else ""
            return Content.assemble(f"step {event['step']}: held-out loss ", (number(event["loss"]), "bold"), spread)
        case "checkpoint":
            return Content(f"step {event['step']}: checkpoint written")
        case "sample":
            return Content.assemble(
                ("“" + one_line(str(event["prompt"]), 60) + "” ", MUTED),
                ("→ " + one_line(str(event["text"])), ""),
            )
        case "gate":
            look = states.PASSED if event["passed"] else states.NOT_PASSED
            return Content.assemble(
                f"gate {event['gate']} ",
                look.label(),
                ("  " + one_line(event.get("reason") or figures(event.get("figures", {}))), MUTED),
            )
        case "warning":
            advice = f" — {event['next']}" if event.get("next") else ""
            return Content.styled("! " + one_line(f"{event['message']}{advice}"), "$text-warning")
        case "failed":
            return Content.assemble(
                ("✗ " + one_line(str(event["reason"])), "$text-error"),
                (" → " + one_line(str(event["next"])), ""),
            )
        case kind:
            return Content(one_line(kind))


def figures(values: Any) -> str:
    """A gate's figures on one line."""
    if not isinstance(values, dict):
        return number(values)
    return ", ".join(f"{one_line(str(name))} {_figure(value)}" for name, value in values.items())


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return f"({figures(value)})"
    if isinstance(value, list):
        return f"[{len(value)}]"
    return number(value)
