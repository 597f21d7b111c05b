"""JSON as it is read from a file: a value from a line, the rows of an array one by one, and where it is malformed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from appliance.data.text import SourceText
from appliance.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class RepeatedKey:
    """What stands for a value in which an object has two items under one key, so that one of them would be lost."""

    key: str


class _Decoder(json.JSONDecoder):
    """NaN and Infinity, which JSON has not, become null; a value with a repeated key becomes a RepeatedKey."""

    def __init__(self) -> None:
        super().__init__(parse_constant=lambda _: None, object_pairs_hook=self._object)
        self._repeated = ""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self._repeated = ""
        value, end = super().raw_decode(s, idx)
        return (RepeatedKey(self._repeated) if self._repeated else value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            self._repeated = next(name for name in names if names.count(name) > 1) or "the empty key"
        return value


_DECODER = _Decoder()
_BLANK = re.compile(r"[ \t\n\r]*")
_IN_A_ROW = frozenset({"messages", "conversations", "conversation", "contents"})
"""Arrays that are a part of one row, and no rows."""
_OF_A_ROW = frozenset({"tools", "functions", "tags", "features"})
"""Arrays that may stand before those of one row, or beside the rows, and hold none."""
_LONGEST_TOKEN = 16
"""No token but a string or a number is longer: a fault this near to the end of a piece may be a token cut in two."""


def parse_line(source: SourceText, line: bytes, number: int, byte: int) -> Any:
    """The value of one line, which begins at that byte. Raises InvalidInput."""
    # Files that were put together begin anew with a mark of their own.
    text = source.decoded(byte, line).rstrip("\r\n").removeprefix("\ufeff")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = (number, error.pos + 1, byte + source.width(text[: error.pos]))
        raise _malformed(source, place, error.msg, "mend it there") from None
    except (RecursionError, ValueError) as error:
        raise _unholdable(source, (number, 1, byte), error) from None


def read_rows(source: SourceText, is_row: Callable[[Any], bool] | None = None) -> Iterator[Any]:
    """The items of the array that the file is, or of the one array in the object that it is; none of an empty file.

    An object whose array holds the messages of one chat is one row.

    At any time one item is held, with what of the file has been read beside it. Raises InvalidInput; with `is_row`,
    which knows a row when it sees one, a Gap is yielded for a damaged stretch, and reading goes on at the next row.
    """
    scanner = _Scanner(source)
    arrays: list[str] = []
    match scanner.peek():
        case "":
            return
        case "[":
            arrays.append("")
            yield from _items(scanner, is_row)
        case "{":
            row: dict[str, Any] = {}
            for key in _keys(scanner):
                # Once it is seen to be a row, all of its arrays are parts of that.
                if scanner.peek() != "[" or key in _IN_A_ROW | _OF_A_ROW or not _IN_A_ROW.isdisjoint(row):
                    row[key] = scanner.value()
                    continue
                arrays.append(key)
                for item in _items(scanner, is_row):
                    if len(arrays) == 1:
                        yield item
            if chat := sorted(_IN_A_ROW & row.keys()):
                if not arrays:
                    yield row
                arrays.append(chat[0])
        case _:
            scanner.value()
    if scanner.peek():
        raise scanner.malformed("Extra data", "if each line is one row, name it .jsonl")
    if len(arrays) != 1:
        held = f"the arrays {', '.join(map(repr, arrays))}" if arrays else "no array of rows"
        raise InvalidInput(
            "no_list_of_rows",
            f"{source.filename} holds {held}",
            "make it one array, or an object with one array",
        )


@dataclass(frozen=True, slots=True)
class Gap:
    """A damaged stretch of an array, between two whole rows."""

    error: InvalidInput
    byte: int
    bytes: int


def _items(scanner: _Scanner, is_row: Callable[[Any], bool] | None) -> Iterator[Any]:
    scanner.skip()
    if scanner.peek() == "]":
        scanner.skip()
        return
    goes_on = True
    while goes_on:
        whole = False
        try:
            value = scanner.value()
            whole = True
            yield value
            goes_on = scanner.goes_on("]")
        except InvalidInput as error:
            if is_row is None:
                raise
            begin = scanner.byte()
            if not scanner.seek(is_row, past=not whole):
                raise
            if lost := scanner.byte() - begin:
                yield Gap(error, begin, lost)


def _keys(scanner: _Scanner) -> Iterator[str]:
    """Each key of an object, with the scanner before its value."""
    scanner.skip()
    if scanner.peek() == "}":
        scanner.skip()
        return
    while True:
        if scanner.peek() != '"':
            raise scanner.malformed("Expecting property name enclosed in double quotes")
        key: str = scanner.value()
        if scanner.peek() != ":":
            raise scanner.malformed("Expecting ':' delimiter")
        scanner.skip()
        yield key
        if not scanner.goes_on("}"):
            return


class _Scanner:
    """A place in the text, of which no more is held than from there to the end of what has been read."""

    def __init__(self, source: SourceText) -> None:
        self._source = source
        self._pieces = source.pieces()
        self._text = ""
        self._at = 0
        self._began = 0
        """Where the last value began."""
        self._start = (1, 1, source.start)
        """Line, column and byte at which the held text begins."""
        self._fault: InvalidInput | None = None
        """Why the file cannot be read to its end."""

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def byte(self) -> int:
        """Where in the file the scanner is."""
        return self._place(self._at)[2]

    def seek(self, is_row: Callable[[Any], bool], past: bool) -> bool:
        """Go to the next object that is a row, `past` this place or at it.

        False where there is none; raises InvalidInput where the file breaks.
        """
        while True:
            begin = self._text.find("{", self._at + past)
            past = True
            if begin < 0:
                self._at = len(self._text)
                if not self._read_more():
                    return False
                past = False
                continue
            self._at = begin
            try:
                row = self.value()
            except InvalidInput as error:
                if error is self._fault:
                    raise
                continue
            if is_row(row):
                self._at = self._began
                return True
            self._at = self._began

    def skip(self) -> None:
        """Go past one character."""
        self._at += 1

    def goes_on(self, closing: str) -> bool:
        """Go past a comma (True) or the closing bracket (False)."""
        found = self.peek()
        if found not in (",", closing):
            raise self.malformed("Expecting ',' delimiter")
        self.skip()
        return found == ","

    def value(self) -> Any:
        """Go past the next value and return it."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or self._near_the_end(error.pos)
                if cut and self._read_more():
                    continue
                raise self.malformed(error.msg, at=error.pos) from None
            except (RecursionError, ValueError) as error:
                raise _unholdable(self._source, self._place(self._at), error) from None
            if isinstance(value, int | float) and self._near_the_end(end) and self._read_more():
                continue
            self._began, self._at = self._at, end
            return value

    def malformed(self, fault: str, next: str = "mend it there", at: int | None = None) -> InvalidInput:
        """The error that says where in the file the scanner (or `at`) is."""
        return _malformed(self._source, self._place(self._at if at is None else at), fault, next)

    def _near_the_end(self, position: int) -> bool:
        return position > len(self._text) - _LONGEST_TOKEN

    def _read_more(self) -> bool:
        """Read at least as much again as is held, so that a long value is not parsed over and over.

        Raises InvalidInput where the file cannot be read further, once all that came before has been handed out.
        """
        held = len(self._text) - self._at
        pieces, size = [], 0
        try:
            for piece in self._pieces:
                pieces.append(piece)
                size += len(piece)
                if size > held:
                    break
        except InvalidInput as fault:
            self._fault = fault
        if size:
            self._start = self._place(self._at)
            self._text = "".join([self._text[self._at :], *pieces])
            self._at = 0
        elif self._fault:
            raise self._fault
        return size > 0

    def _place(self, position: int) -> tuple[int, int, int]:
        line, column, byte = self._start
        passed = self._text[:position]
        newlines = passed.count("\n")
        column = len(passed) - passed.rfind("\n") if newlines else column + len(passed)
        return line + newlines, column, byte + self._source.width(passed)


def _unholdable(source: SourceText, place: tuple[int, int, int], error: Exception) -> InvalidInput:
    """The error for a value that is JSON but more than the parser takes."""
    if isinstance(error, RecursionError):
        return _malformed(source, place, "it is nested too deeply", "make it flatter")
    return _malformed(source, place, str(error).partition(";")[0], "shorten the number")


def _malformed(source: SourceText, place: tuple[int, int, int], fault: str, next: str) -> InvalidInput:
    line, column, byte = place
    return InvalidInput(
        "malformed_json",
        f"{source.filename} is malformed at line {line}, column {column} (byte {byte}): {fault}",
        next,
    )
