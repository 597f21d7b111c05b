"""What the command prints: data on stdout, narration on stderr, the same on a terminal and in a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from appliance.errors import ApplianceError

if TYPE_CHECKING:
    from appliance import api

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421,
    **{code: 0xFFFD for code in range(0x80, 0xA0)},
}


def say(text: str) -> None:
    """Narrate: a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def complain(error: ApplianceError) -> None:
    """The one line for a person on stderr."""
    say(f"appliance: error: {error}")


def print_json(value: Any) -> None:
    """`value` (models, lists and dicts of them) as JSON on stdout."""
    print(json.dumps(value, default=_plain, indent=1, ensure_ascii=False))


def print_json_line(value: Any) -> None:
    """`value` as one line of JSON on stdout, at once."""
    print(json.dumps(value, default=_plain, ensure_ascii=False), flush=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under `headers`, as wide as their longest cell, which may hold text from elsewhere."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_forecasts(found: api.Forecasts) -> None:
    """What stages would take, a column each; what does not fit, and what would make it."""
    forecasts = found.stages
    parts = [part for part in forecasts[0]["memory"] if part != "total"] if forecasts else []
    rows = [(part, *(size(one["memory"][part]) for one in forecasts)) for part in parts]
    rows += [
        ("memory", *(size(one["memory"]["total"]) for one in forecasts)),
        ("available", *(size(one["available"]) for one in forecasts)),
        ("disk", *(size(one["disk"]) for one in forecasts)),
        ("largest pass", *(f"{one['rows_at_once']} x {one['width_at_once']} tokens" for one in forecasts)),
        ("gradient checkpointing", *(_checkpointed(one["every_n_layers"]) for one in forecasts)),
        ("tokens", *(f"{one['tokens']:,}" for one in forecasts)),
        ("steps", *(f"{one['steps']:,}" for one in forecasts)),
        ("time", *(f"about {duration(one['seconds'])}" for one in forecasts)),
        ("fits", *("yes" if one["fits"] else "NO" for one in forecasts)),
    ]
    print_table(("", *(one["stage"].upper() for one in forecasts)), rows)
    for one in forecasts:
        if not one["fits"]:
            say(f"{one['stage']} does not fit: {one['advice']}")
    if serving := found.serving:
        has = "" if serving.available is None else f" of {size(serving.available)}"
        how = " in FP8, because it does not fit in 16 bits" if serving.precision == "FP8" else ""
        print(f"the release takes {size(serving.needed)}{has} to be verified and served{how}")
        if not serving.fits:
            say('it does not fit: take a smaller base, or set end = "adapter" to train its adapter alone')


def _checkpointed(every_n_layers: int) -> str:
    return {0: "off", 1: "on"}.get(every_n_layers, f"1 layer in {every_n_layers}")


def canary_lines(canary: api.Canary) -> list[str]:
    """The canary under way: its share, what it waits for, the figures of both sides, and its limits."""
    lines = [f"{canary.release} answers {percent(canary.share)} of the conversations; {canary.reason}"]
    for side in canary.figures:
        stops = ", ".join(f"{count} {reason}" for reason, count in side.stops.items())
        times = [f"{name} {spread.median:.3g} s (95%: {spread.p95:.3g} s)" for name, spread in side.seconds.items()]
        ratings = ", ".join(f"{count} rated {rating}" for rating, count in side.ratings.items())
        parts = [f"{side.requests} requests, {side.errors} failed", stops, ratings, *times]
        lines.append(f"{side.release}: {'; '.join(filter(None, parts))}")
    return [*lines, *canary.limits]


def check_line(check: api.Check) -> str:
    """How far the reading of a release's files is."""
    far = f": {size(check.read)} of {size(check.bytes)}" if check.bytes else ""
    return f"the files of {check.release} are being read{far}"


def engine_line(engine: api.Engine, running: str | None) -> str:
    """What an engine process does, where it sleeps for which run, and why the one before it failed."""
    if engine.state == "sleeping" and running:
        return f"{engine.kind} for {engine.release} asleep while {running} trains"
    why = f": the last one {visible(engine.reason)}" if engine.reason else ""
    return f"{engine.kind} {engine.state} for {engine.release}{why}"


def percent(share: float) -> str:
    """A share of 1 in per cent."""
    return f"{100 * share:.3g}%"


def visible(text: str) -> str:
    """A text from data as a terminal can safely show it: control characters as their pictures."""
    return text.translate(_PICTURES)


def ago(moment: float) -> str:
    """How long since a Unix time."""
    return duration(max(0.0, time.time() - moment)) + " ago"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} d"


def size(bytes: int) -> str:
    """Bytes in the decimal unit that suits them."""
    amount = float(bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit in ("B", "kB") else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def event_line(event: dict[str, Any]) -> str:
    """An event of a run as a line for a person."""
    stage, kind = event["stage"], event["event"]
    match kind:
        case "step":
            return (
                f"{stage} step {event['step']}/{event['steps']}  loss {event['loss']:.4f}  "
                f"{event['tokens_per_second']:.0f} tok/s  {duration(event['eta_seconds'])} left"
            )
        case "forecast":
            memory = f"{size(event['memory']['total'])} of {size(event['available'])} memory"
            how = " with gradient checkpointing" if event.get("gradient_checkpointing") else ""
            advice = "" if event["fits"] else f", which does not fit: {event['advice']}"
            return f"{stage} takes {event['steps']} steps, about {duration(event['seconds'])}, {memory}{how}{advice}"
        case "eval":
            return f"{stage} step {event['step']}  held-out loss {event['loss']:.4f}{_give_or_take(event)}"
        case "sample":
            return f"{stage} sample  {event['prompt']!r} -> {event['text']!r}"
        case "checkpoint":
            return f"{stage} checkpoint at step {event['step']}"
        case "warning":
            advice = f" — {event['next']}" if event.get("next") else ""
            return "\n    ".join([f"{stage} warning: {event['message']}{advice}", *event.get("log", ())])
        case "gate":
            return (
                f"{stage} gate {event['gate']}: {'passed' if event['passed'] else 'FAILED ' + event.get('reason', '')}"
            )
        case "stage_finished":
            return f"{stage} finished in {duration(event['seconds'])}"
        case "failed":
            return f"{stage} failed: {event['reason']} — {event['next']}"
        case _:
            return f"{stage} started"


def _give_or_take(event: dict[str, Any]) -> str:
    """Half the width of the interval of a loss, where it is known."""
    low, high = event.get("interval") or (0, 0)
    return f" ± {(high - low) / 2:.4f}" if high > low else ""


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json")
