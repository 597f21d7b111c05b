"""Why a record is no row, and what its values are, for a person."""

from __future__ import annotations

import ast
import json
from typing import Any


class Dropped(Exception):
    """Why a record is no row: a code for programs, a reason for a person."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def from_json(value: Any, *, python: bool = False) -> Any:
    """What a string holds as JSON, as ShareGPT and OpenAI files have it, or in Python's notation; else the value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_number, object_pairs_hook=_distinct) if value.strip() else None
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip()) if python else value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def _no_number(name: str) -> None:
    raise ValueError(name)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Dropped("repeated_key", f"`{twice}` stands twice in JSON that a text holds, and only one could be read")
    return value


def kind_name(value: Any) -> str:
    """What a value is, for a person."""
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
