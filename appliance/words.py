"""Words for a person, the same in the command and on the dashboard: figures, times, events, and foreign text."""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from appliance import api

Tone = Literal["", "muted", "strong", "good", "bad", "warning"]
"""What a piece of text is, for a screen that has colours."""

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links, clipboard
    r"|\x1b[@-Z\\-_]"
)
_JOINERS = "\u200c\u200d"
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # what moves a cursor or rings a bell
    r"|[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0]"
    r"|[\U000e0000-\U000e0fff]"
    # Joiners belong between letters of scripts that need them, and within emoji; beside ASCII they hide.
    rf"|(?<![^\x00-\x7f])[{_JOINERS}]|[{_JOINERS}](?![^\x00-\x7f])"
)
_SHORT_SAMPLE = 60
_LONG_SAMPLE = 200


class Said(NamedTuple):
    """A piece of a line."""

    text: str
    tone: Tone = ""


def visible(text: str) -> str:
    """Text of unknown origin as a terminal can safely show it: what controls or hides is written out.

    Newlines stay, and tabs become spaces.
    """
    return _UNSEEN.sub(_written_out, text).expandtabs(4)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"


def one_line(text: str, limit: int = 0) -> str:
    """`visible` text on one line; of more than `limit` characters the first ones."""
    line = " ".join(visible(text[: 4 * limit] if limit else text).split())
    return line if not limit or len(line) <= limit else line[: limit - 1] + "…"


def log_line(line: str) -> str:
    """A line of a process's output as it stands in the end: without colours, and after the last carriage return."""
    return visible(_ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2])


def size(count: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits."""
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


def ago(then: float, now: float | None = None) -> str:
    """How long since a Unix time, in its largest unit."""
    seconds = max(0, int((time.time() if now is None else now) - then))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit} ago"
    return "just now"


def percent(share: float) -> str:
    """A share of 1 in per cent."""
    return f"{100 * share:.3g}%"


def number(value: Any) -> str:
    """A figure with four significant digits, whatever was reported."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line(str(value), _LONG_SAMPLE)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"


def figures(values: Any) -> str:
    """Measured values by their names, on one line."""
    if not isinstance(values, dict):
        return number(values)
    return ", ".join(f"{one_line(str(name))} {_figure(value)}" for name, value in values.items())


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return f"({figures(value)})"
    return f"[{len(value)}]" if isinstance(value, list) else number(value)


def event_line(event: dict[str, Any]) -> str:
    """An event of a run as a line for a person; below a warning the last lines of the log that it quotes."""
    told = "".join(piece.text for piece in event_words(event))
    return "\n    ".join([f"{event['stage']} {told}", *map(log_line, event.get("log", ()))])


def event_words(event: dict[str, Any]) -> list[Said]:
    """What an event of a run says, piece by piece, without its stage."""
    match event["event"]:
        case "stage_started":
            return [Said("started", "strong")]
        case "stage_finished":
            return [Said("✓ done", "good"), Said(f" in {duration(event['seconds'])}")]
        case "step":
            return [
                Said(f"step {event['step']}/{event['steps']}: loss "),
                Said(_loss(event), "strong"),
                Said(f", {event['tokens_per_second']:,.0f} tok/s, {duration(event['eta_seconds'])} left"),
            ]
        case "forecast":
            return _forecast_words(event)
        case "eval":
            low, high = event.get("interval") or (0, 0)
            spread = f" ± {number((high - low) / 2)}" if high > low else ""
            return [Said(f"step {event['step']}: held-out loss "), Said(_loss(event), "strong"), Said(spread)]
        case "checkpoint":
            return [Said(f"step {event['step']}: checkpoint written")]
        case "sample":
            prompt, text = one_line(str(event["prompt"]), _SHORT_SAMPLE), one_line(str(event["text"]), _LONG_SAMPLE)
            return [Said(f"“{prompt}” ", "muted"), Said(f"→ {text}")]
        case "gate":
            verdict = Said("✓ passed", "good") if event["passed"] else Said("✗ failed", "bad")
            why = one_line(event.get("reason") or figures(event.get("figures", {})))
            return [Said(f"gate {event['gate']} "), verdict, Said(f"  {why}" if why else "", "muted")]
        case "warning":
            advice = f" — {event['next']}" if event.get("next") else ""
            return [Said("! " + one_line(f"{event['message']}{advice}"), "warning")]
        case "failed":
            return [Said("✗ " + one_line(str(event["reason"])), "bad"), Said(" — " + one_line(str(event["next"])))]
        case kind:
            return [Said(one_line(str(kind)))]


def _loss(event: dict[str, Any]) -> str:
    return number(math.nan if event["loss"] is None else event["loss"])


def _forecast_words(event: dict[str, Any]) -> list[Said]:
    memory = f"{size(event['memory']['total'])} of {size(event['available'])} memory"
    how = " with gradient checkpointing" if event.get("gradient_checkpointing") else ""
    takes = f"takes {event['steps']} steps, about {duration(event['seconds'])}, {memory}{how}"
    advice = "" if event.get("fits", True) else f", which does not fit: {one_line(event['advice'])}"
    return [Said(takes), Said(advice, "warning")]


def trained_words(conversation: api.Conversation) -> list[Said]:
    """A conversation as a model is trained on it: ⟦trained⟧, and the rest of what it reads."""
    said: list[Said] = []
    inside = False
    for piece in conversation.pieces:
        if piece.trained != inside:
            said.append(Said("⟦" if piece.trained else "⟧", "strong"))
            inside = piece.trained
        said.append(Said(visible(piece.text), "good" if piece.trained else "muted"))
    return [*said, Said("⟧", "strong")] if inside else said


def trained_count(conversation: api.Conversation) -> str:
    """How many tokens it has, and how many of them are trained."""
    return f"{conversation.tokens:,} tokens, {conversation.trained:,} of them trained"


def check_line(check: api.Check) -> str:
    """How far the reading of a release's files is."""
    far = f": {size(check.read)} of {size(check.bytes)}" if check.bytes else ""
    return f"the files of {check.release} are being read{far}"


def canary_title(canary: api.Canary) -> str:
    """Its share, and what has come of it."""
    return f"canary of {percent(canary.share)}{'' if canary.ended is None else f' {canary.outcome}'}"


def canary_side(side: api.CanaryFigures) -> str:
    """What one release has answered while a canary lasts."""
    stops = ", ".join(f"{count} {reason}" for reason, count in side.stops.items())
    ratings = ", ".join(f"{count} rated {rating}" for rating, count in side.ratings.items())
    times = [f"{name} {spread.median:.3g} s (95%: {spread.p95:.3g} s)" for name, spread in side.seconds.items()]
    parts = [f"{side.requests} requests, {side.errors} failed", stops, ratings, *times]
    return one_line(f"{side.release}: {'; '.join(filter(None, parts))}")


def pull_line(pull: api.Pull) -> str:
    """How far the pulling of a model is."""
    if pull.state != "pulling" or not pull.bytes:
        return pull.said
    return f"{pull.name}: {size(pull.bytes)}{f' of {size(pull.total)}' if pull.total else ''} here"
