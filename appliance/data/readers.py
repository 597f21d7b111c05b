"""From a file to its records. A file that is not what its name says is refused whole, with the place of the fault."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data.arrow import read_arrow, read_parquet
from appliance.data.json_text import Gap, parse_line, read_rows
from appliance.data.text import COMPRESSED, SourceText
from appliance.errors import InvalidInput

_EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = (";", "\t", "|")
"""What stands in their place in files that call themselves otherwise."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_CELL = 1 << 26
"""Characters; a quote that nothing closes takes the rest of the file into one cell."""


@dataclass(slots=True)
class Record:
    """One value of a source. `place` is {"line": from 1} in JSON Lines and tables, {"index": from 0} elsewhere."""

    place: dict[str, int]
    value: Any


@dataclass(slots=True)
class Damaged:
    """A stretch of a source that holds no whole record; `bytes` None: all that is left of it."""

    place: dict[str, int]
    error: InvalidInput
    bytes: int | None


IsRow = Callable[[Any], bool]


def read_records(
    path: Path, filename: str, is_row: IsRow | None = None, encoding: str = "utf-8"
) -> Iterator[Record | Damaged]:
    """The records of the file at `path`, read as the extensions of `filename` say, in their order.

    Raises InvalidInput for an unknown extension, a file that cannot be read, damaged or truncated compression, bytes
    that are no text, and what is malformed, with its place. With `is_row`, which knows a row when it sees one, damage
    is yielded instead, and what is whole after it is read. Blank lines are no records.
    """
    try:
        for record in _records(path, filename, is_row, encoding):
            if isinstance(record, Damaged) and is_row is None:
                error = record.error
                raise InvalidInput(error.code, error.message, f"{error.next}, or keep what is whole with --salvage")
            yield record
    except OSError as error:
        raise InvalidInput("unreadable_file", f"cannot read {filename}: {error.strerror}", "check the path") from None


def _records(path: Path, filename: str, is_row: IsRow | None, encoding: str) -> Iterator[Record | Damaged]:
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            fault = f"{filename} is a Git LFS pointer, and not the file that it stands for"
            raise InvalidInput("lfs_pointer", fault, "fetch the file with `git lfs pull`, then import it")
    kind, unpack = _kind(path, filename, encoding)
    match kind:
        case ".jsonl" | ".ndjson":
            return _json_lines(SourceText(path, filename, unpack, encoding))
        case ".json":
            return _indexed(read_rows(SourceText(path, filename, unpack, encoding), is_row))
        case ".csv" | ".tsv":
            return _table(SourceText(path, filename, unpack, encoding), _DELIMITERS[kind])
        case ".parquet" if not unpack:
            return _indexed(read_parquet(path, filename))
        case ".arrow" if not unpack:
            return _indexed(read_arrow(path, filename))
    raise InvalidInput(
        "unknown_file_type",
        f"{filename} is not of a kind that can be read, by its name or its beginning",
        "use .jsonl, .json, .csv or .tsv (each also as .gz or .zst), .parquet or .arrow, or say which it is (--type)",
    )


def _kind(path: Path, filename: str, encoding: str) -> tuple[str, str]:
    """Extension and compression of a file, by its name; what that does not tell, by its beginning."""
    *_, inner, outer = ["", "", *(suffix.lower() for suffix in Path(filename).suffixes)]
    unpack = outer if outer in COMPRESSED else ""
    kind = inner if unpack else outer
    if kind in _EXTENSIONS:
        return kind, unpack
    with open(path, "rb") as file:
        head = file.read(4)
    unpack = unpack or next((name for name, magic in COMPRESSED.items() if head.startswith(magic)), "")
    if head == b"PAR1":
        return ".parquet", ""
    first = next(
        (line for _, line in SourceText(path, filename, unpack, encoding).lines() if not line.isspace()), b""
    ).strip()
    if first.startswith(b"["):
        return ".json", unpack
    if first.startswith(b"{"):
        return ".jsonl" if first.endswith(b"}") else ".json", unpack
    return "", unpack


def _json_lines(source: SourceText) -> Iterator[Record | Damaged]:
    number = 0
    try:
        for number, (byte, line) in enumerate(source.lines(), 1):
            if line.isspace():
                continue
            try:
                yield Record({"line": number}, parse_line(source, line, number, byte))
            except InvalidInput as error:
                yield Damaged({"line": number, "byte": byte}, error, len(line))
    except InvalidInput as error:
        yield Damaged({"line": number + 1}, error, None)


def _indexed(values: Iterator[Any]) -> Iterator[Record | Damaged]:
    """Values with their indices; a gap between them has one too."""
    index = -1
    try:
        for index, value in enumerate(values):
            if isinstance(value, Gap):
                yield Damaged({"index": index, "byte": value.byte}, value.error, value.bytes)
            else:
                yield Record({"index": index}, value)
    except InvalidInput as error:
        yield Damaged({"index": index + 1}, error, None)


def _table(source: SourceText, delimiter: str) -> Iterator[Record | Damaged]:
    """Each row after the header as an object of texts, at the line on which it begins.

    A header of one cell that holds semicolons or tabs says that these are the delimiters; a column without a name goes
    by its number.
    """
    csv.field_size_limit(_LONGEST_CELL)
    lines = _Lines(source)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = lines.count + 1
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            if header and len(cells) != len(header):
                fault = f"{len(cells)} cells under a header of {len(header)}"
                raise _malformed(source, line, fault, "mend the row, or quote cells that hold the delimiter")
        except (csv.Error, InvalidInput) as error:
            if isinstance(error, csv.Error):
                error = _malformed(source, line, str(error), "quote cells that hold quotes or line breaks")
            if not header:
                raise error from None
            yield Damaged({"line": line}, error, lines.bytes)
            lines.bytes = 0
            continue
        if header:
            yield Record({"line": line}, dict(zip(header, cells, strict=True)))
            lines.bytes = 0
            continue
        if cells[0].startswith("sep=") and len("".join(cells)) <= len("sep=;"):
            # Excel's own line before the header.
            reader = csv.reader(lines, delimiter=cells[0][4:] or delimiter, strict=True)
            continue
        if len(cells) == 1 and (other := next((mark for mark in _OTHER_DELIMITERS if mark in cells[0]), "")):
            reader = csv.reader(lines, delimiter=other, strict=True)
            cells = next(csv.reader([cells[0]], delimiter=other, strict=True))
        header = [name.strip() or f"column {number}" for number, name in enumerate(cells, 1)]
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            fault = f"its header has the column {repeated[0]!r} more than once"
            raise _malformed(source, line, fault, "rename the columns")


class _Lines(Iterator[str]):
    """The lines of a source as text. One that is none is an error, after which the next can be read."""

    def __init__(self, source: SourceText) -> None:
        self._source = source
        self._lines = source.lines()
        self.count = 0
        self.bytes = 0
        """Bytes of the lines since the reader of rows has set it to 0."""

    def __next__(self) -> str:
        byte, line = next(self._lines)
        self.count += 1
        self.bytes += len(line)
        return self._source.decoded(byte, line)


def _malformed(source: SourceText, line: int, fault: str, next: str) -> InvalidInput:
    return InvalidInput("malformed_table", f"{source.filename} is malformed at line {line}: {fault}", next)
