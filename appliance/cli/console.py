"""How the command prints: data on stdout, narration on stderr, the same on a terminal and in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from appliance.errors import ApplianceError
from appliance.words import visible


def say(text: str) -> None:
    """Narrate: a line on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A line of data on stdout, which may hold text from elsewhere."""
    print(visible(text))


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


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json")
