"""From a file to its records. A file that is not what its name says is refused whole, with the place of the fault."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data.json_text import parse_line, read_rows
from appliance.data.parquet import read_parquet
from appliance.data.text import COMPRESSED, SourceText
from appliance.errors import InvalidInput

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 1 << 26
"""Characters; a quote that nothing closes takes the rest of the file into one cell."""


@dataclass(frozen=True, slots=True)
class Record:
    """One value of a source. `place` is {"line": from 1} in JSON Lines and tables, {"index": from 0} elsewhere."""

    place: dict[str, int]
    value: Any


def read_records(path: Path, filename: str) -> Iterator[Record]:
    """The records of the file at `path`, read as the extensions of `filename` say, in their order.

    Raises InvalidInput for an unknown extension, a file that cannot be read, damaged or truncated compression, bytes
    that are no text, and what is malformed, with its place. Blank lines are no records.
    """
    *_, inner, outer = ["", "", *(suffix.lower() for suffix in Path(filename).suffixes)]
    try:
        match inner if outer in COMPRESSED else outer:
            case ".jsonl" | ".ndjson":
                yield from _json_lines(SourceText(path, filename))
            case ".json":
                rows = read_rows(SourceText(path, filename))
                yield from (Record({"index": index}, value) for index, value in enumerate(rows))
            case ".csv" | ".tsv" as kind:
                yield from _table(SourceText(path, filename), _DELIMITERS[kind])
            case ".parquet" if outer == ".parquet":
                rows = read_parquet(path, filename)
                yield from (Record({"index": index}, value) for index, value in enumerate(rows))
            case _:
                raise InvalidInput(
                    "unknown_file_type",
                    f"{filename} is not of a kind that can be read, by its name",
                    "use .jsonl, .json, .csv or .tsv (each also as .gz or .zst) or .parquet",
                )
    except OSError as error:
        raise InvalidInput("unreadable_file", f"cannot read {filename}: {error.strerror}", "check the path") from None


def _json_lines(source: SourceText) -> Iterator[Record]:
    for number, (byte, line) in enumerate(source.lines(), 1):
        if line.strip():
            yield Record({"line": number}, parse_line(source, line.rstrip("\r\n"), number, byte))


def _table(source: SourceText, delimiter: str) -> Iterator[Record]:
    """Each row after the header as an object of texts, at the line on which it begins."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader((line for _, line in source.lines()), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _malformed(source, line, str(error), "quote cells that hold quotes or line breaks") from None
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                fault = f"its header has the column {repeated[0]!r} more than once"
                raise _malformed(source, line, fault, "rename the columns")
        elif len(cells) != len(header):
            fault = f"{len(cells)} cells under a header of {len(header)}"
            raise _malformed(source, line, fault, "mend the row, or quote cells that hold the delimiter")
        else:
            yield Record({"line": line}, dict(zip(header, cells, strict=True)))


def _malformed(source: SourceText, line: int, fault: str, next: str) -> InvalidInput:
    return InvalidInput("malformed_table", f"{source.filename} is malformed at line {line}: {fault}", next)
