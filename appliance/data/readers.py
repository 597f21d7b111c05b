"""From a file to its records. A file that is not what its name says is refused whole, with the place of the fault."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Record:
    """One value of a source. `place` is {"line": from 1} in JSON Lines and {"index": from 0} in a JSON array."""

    place: dict[str, int]
    value: Any


def read_records(path: Path, filename: str) -> Iterator[Record]:
    """The records of the file at `path`, read as the extension of `filename` says, in their order.

    Raises InvalidInput for an unknown extension, a file that cannot be read, text that is not UTF-8 (with its byte)
    and malformed JSON (with line, column and byte). Blank lines of JSON Lines are no records.
    """
    extension = Path(filename).suffix.lower()
    try:
        if extension in JSON_LINES:
            yield from _json_lines(path, filename)
        elif extension == ".json":
            yield from _json(path, filename)
        else:
            raise InvalidInput(
                "unknown_file_type",
                f"{filename} is neither JSON nor JSON Lines by its name",
                "name the file .json, or .jsonl where each line is one row",
            )
    except OSError as error:
        raise InvalidInput("unreadable_file", f"cannot read {filename}: {error.strerror}", "check the path") from None


def _json_lines(path: Path, filename: str) -> Iterator[Record]:
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            text = _decode(content, filename, start + len(line) - len(content))
            if text.strip():
                yield Record({"line": number}, _parse(text.rstrip("\r\n"), filename, line=number, byte=start))
            start += len(line)


def _json(path: Path, filename: str) -> Iterator[Record]:
    content = path.read_bytes()
    body = content.removeprefix(codecs.BOM_UTF8)
    text = _decode(body, filename, len(content) - len(body))
    if not text.strip():
        return
    value = _parse(text, filename, line=1, byte=0)
    for index, item in enumerate(_list_in(value, filename)):
        yield Record({"index": index}, item)


def _list_in(value: Any, filename: str) -> list[Any]:
    """The array itself, or the one array that the object holds."""
    if isinstance(value, list):
        return value
    lists = [key for key, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
    if len(lists) != 1:
        held = f"the arrays {', '.join(map(repr, lists))}" if lists else "no array of rows"
        raise InvalidInput(
            "no_list_of_rows", f"{filename} holds {held}", "make it one array, or an object with one array"
        )
    rows: list[Any] = value[lists[0]]
    return rows


def _decode(content: bytes, filename: str, start: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "not_utf8",
            f"{filename} is not UTF-8: byte {start + error.start} is 0x{content[error.start]:02x}",
            "save it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8`",
        ) from None


def _parse(text: str, filename: str, line: int, byte: int) -> Any:
    """The value of `text`, which begins at that line and byte. NaN and Infinity, which JSON has not, become null."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        at = (line + error.lineno - 1, error.colno, byte + len(text[: error.pos].encode()))
        hint = "if each line is one row, name it .jsonl" if error.msg == "Extra data" and line == 1 else "mend it there"
        raise _malformed(filename, at, error.msg, hint) from None
    except RecursionError:
        raise _malformed(filename, (line, 1, byte), "it is nested too deeply", "make it flatter") from None
    except ValueError as error:  # a number of thousands of digits
        raise _malformed(filename, (line, 1, byte), str(error).partition(";")[0], "shorten the number") from None


def _malformed(filename: str, at: tuple[int, int, int], fault: str, next: str) -> InvalidInput:
    line, column, byte = at
    return InvalidInput(
        "malformed_json", f"{filename} is malformed at line {line}, column {column} (byte {byte}): {fault}", next
    )
