"""Nested data (a manifest, a report) as an indented outline, and a dataset's rows as text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from textual.content import Content

from appliance import api
from tui.viewmodels import states
from tui.viewmodels.format import number, one_line, plain
from tui.viewmodels.history import figures
from tui.viewmodels.styles import MUTED

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
        lines.append(Content.styled(plain(release.damage), "$text-error"))
    if release.check:
        lines.append(Content.styled(f"its files are being read: {_share_read(release.check)}", "$text-warning"))
    if release.reason:
        lines.append(Content.styled(plain(release.reason), "$text-error" if look is states.REFUSED else ""))
    if release.note:
        lines.append(Content(plain(release.note)))
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


def _share_read(check: api.Check) -> str:
    return f"{100 * check.read // max(1, check.bytes)}%"


def _canary(canary: api.Canary) -> list[Content]:
    """Its share, what it waits for or came to, and the figures of both sides."""
    came = "" if canary.ended is None else f" {canary.outcome}"
    style = "$text-error" if canary.outcome == "rolled back" else ""
    head = (f"{states.CANARY.glyph} canary of {100 * canary.share:.3g}%{came}  ", states.CANARY.style)
    lines = [Content(""), Content.assemble(head, (plain(canary.reason), style))]
    for side in canary.figures:
        medians = {name: spread.median for name, spread in side.seconds.items()}
        ratings = {f"rated {rating}": count for rating, count in side.ratings.items()}
        told = figures({"requests": side.requests, "failed": side.errors, **side.stops, **ratings, **medians})
        lines.append(Content.styled(f"  {one_line(f'{side.release}: {told}', 400)}", MUTED))
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
            parts.append(Content(plain(_content(turn)) + "\n"))
    rest = {key: value for key, value in row.items() if key not in _PARTS}
    if rest:
        parts.append(outline(rest))
    return Content("\n").join(parts)


def trained_text(conversations: list[api.Conversation]) -> Content:
    """Conversations as they are trained on: what is trained in brackets and in its own colour, and how many tokens."""
    parts: list[Content] = []
    for conversation in conversations:
        if conversation.problem:
            parts.append(Content.styled(f"cannot be trained on: {plain(conversation.problem)}", "$text-error"))
            continue
        said: list[tuple[str, str]] = []
        for piece, before in zip(conversation.pieces, (None, *conversation.pieces), strict=False):
            if piece.trained != (before is not None and before.trained):
                said.append(("⟦" if piece.trained else "⟧", "bold $text-success"))
            said.append((plain(piece.text), "$text-success" if piece.trained else MUTED))
        if conversation.pieces and conversation.pieces[-1].trained:
            said.append(("⟧", "bold $text-success"))
        parts.append(Content.assemble(*said))
        counts = f"{conversation.tokens:,} tokens, {conversation.trained:,} of them trained"
        parts.append(Content.styled(f"{counts}\n", "$text-accent"))
    return Content("\n").join(parts)


def _spoken(turns: Any) -> str:
    return one_line(" ".join(_content(turn) for turn in turns), 160)


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, str) and content:
        return content
    return json.dumps({key: value for key, value in turn.items() if key != "role"}, ensure_ascii=False)
