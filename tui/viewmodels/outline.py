"""Nested data (a manifest, a report) as an indented outline, and a dataset's rows as text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from textual.content import Content

from appliance import api
from appliance.words import (
    canary_side,
    canary_title,
    check_line,
    figures,
    number,
    one_line,
    trained_count,
    trained_words,
    visible,
)
from tui.viewmodels import states
from tui.viewmodels.styles import MUTED, spoken

_MOST_ITEMS = 200
_PARTS = ("messages", "prompt", "chosen", "rejected", "completion")


def outline(value: Any) -> Content:
    """Every key on a line of its own; long lists are cut, and say so."""
    return Content("\n").join(_lines(value, ""))


def _lines(value: Any, indent: str) -> Iterator[Content]:
    if not isinstance(value, dict | list):
        yield Content(indent + _scalar(value))
        return
    entries = value.items() if isinstance(value, dict) else (("•", item) for item in value)
    for name, item in islice(entries, _MOST_ITEMS):
        key = (f"{indent}{one_line(str(name))}", "$text-primary")
        if not isinstance(item, dict | list) or not item:
            yield Content.assemble(key, "  ", _moment(item) if name == "created" else _scalar(item))
        elif isinstance(value, list) and not any(isinstance(part, dict | list) for part in _parts(item)):
            yield Content.assemble(key, "  ", figures(item))
        else:
            yield Content.assemble(key)
            yield from _lines(item, indent + "  ")
    if len(value) > _MOST_ITEMS:
        yield Content.styled(f"{indent}… and {len(value) - _MOST_ITEMS:,} more", MUTED)


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _moment(seconds: Any) -> str:
    """Unix seconds as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(seconds)))


def _scalar(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    return one_line(str(value), 400)


def gates(release: api.Release, manifest: dict[str, Any] | None) -> Content:
    """Each gate with its verdict and its figures; why a refused release was refused."""
    look = states.release_look(release)
    head: list[Content | tuple[str, str]] = [look.label()]
    if release.live:
        head += [("   ", ""), states.LIVE.label()]
    head += [("   base ", MUTED), (release.base, "")]
    lines = [Content.assemble(*head)]
    if release.damage:
        lines.append(Content.styled(visible(release.damage), "$text-error"))
    if release.check:
        lines.append(Content.styled(check_line(release.check), "$text-warning"))
    if release.reason:
        lines.append(Content.styled(visible(release.reason), "$text-error" if look is states.REFUSED else ""))
    if release.note:
        lines.append(Content(visible(release.note)))
    lines += _canary(release.canary) if release.canary else []
    recorded: dict[str, Any] = (manifest or {}).get("gates", {})
    for name, passed in release.gates.items():
        verdict = states.PASSED if passed else states.NOT_PASSED
        lines += [Content(""), Content.assemble((f"{verdict.glyph} {name} ", f"bold {verdict.style}"), verdict.word)]
        measured = recorded.get(name, {})
        for told in (measured.get("reason"), figures(measured.get("figures", {}))):
            if told:
                lines.append(Content.styled(f"  {one_line(told, 400)}", MUTED))
    if not release.gates:
        lines += [Content(""), Content.styled("no gate was measured", MUTED)]
    return Content("\n").join(lines)


def _canary(canary: api.Canary) -> list[Content]:
    """Its share, what it waits for or came to, and the figures of both sides."""
    style = "$text-error" if canary.outcome == "rolled back" else ""
    head = (f"{states.CANARY.glyph} {canary_title(canary)}: ", states.CANARY.style)
    lines = [Content(""), Content.assemble(head, (visible(canary.reason), style))]
    lines += [Content.styled(f"  {canary_side(side)}", MUTED) for side in canary.figures]
    return [*lines, *(Content.styled(f"  {limit}", MUTED) for limit in canary.limits)]


def row_preview(row: dict[str, Any]) -> Content:
    """A row on one line: what is asked, and the answer (the chosen one)."""
    asked = row.get("prompt") or [turn for turn in row.get("messages", ()) if turn.get("role") == "user"][:1]
    answered = row.get("chosen") or row.get("completion") or row.get("messages", ())[-1:]
    return Content.assemble((_spoken(asked), ""), (" → ", MUTED), (_spoken(answered), "$text-primary"))


def row_text(row: dict[str, Any]) -> Content:
    """A whole row: every turn under its role."""
    parts: list[Content] = []
    for title in _PARTS:
        turns = row.get(title)
        if not turns:
            continue
        if title != "messages":
            parts.append(Content.styled(title, "bold $text-accent"))
        for turn in turns:
            parts.append(Content.styled(str(turn.get("role", "?")), "bold $text-primary"))
            parts.append(Content(visible(_content(turn)) + "\n"))
    rest = {key: value for key, value in row.items() if key not in _PARTS}
    if rest:
        parts.append(outline(rest))
    return Content("\n").join(parts)


def trained_text(conversations: list[api.Conversation]) -> Content:
    """Conversations as they are trained on: what is trained in brackets and in its own colour, and how many tokens."""
    parts: list[Content] = []
    for conversation in conversations:
        if conversation.problem:
            parts.append(Content.styled(f"cannot be trained on: {visible(conversation.problem)}", "$text-error"))
            continue
        parts.append(spoken(trained_words(conversation)))
        parts.append(Content.styled(f"{trained_count(conversation)}\n", "$text-accent"))
    return Content("\n").join(parts)


def _spoken(turns: Any) -> str:
    return one_line(" ".join(_content(turn) for turn in turns), 160)


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, str) and content:
        return content
    return json.dumps({key: value for key, value in turn.items() if key != "role"}, ensure_ascii=False)
