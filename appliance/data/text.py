"""From a file to its text: decompressed, decoded, and every fault at its byte."""

from __future__ import annotations

import codecs
import contextlib
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from appliance.data.encoding import as_read, likely_encodings
from appliance.errors import InvalidInput

COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
"""Extensions of compressed files, and the bytes with which these begin."""

_SAMPLE = 1 << 14
"""Bytes before and after a fault by which an encoding is guessed."""
_CHUNK = 1 << 20
_PACKED_CHUNK = 1 << 16

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class SourceText:
    """The text of the file at `path`, which its owner calls `filename`, read once and in pieces.

    `unpack` (.gz or .zst) says how it is compressed; bytes are then counted in what comes out. A byte order mark says
    the encoding and is no text; without one it is `encoding`.
    """

    def __init__(self, path: Path, filename: str, unpack: str = "", encoding: str = "utf-8") -> None:
        self.filename = filename
        self._open = partial({".gz": _gzip, ".zst": _zstd}.get(unpack, _plain), path, filename)
        self._chunks = self._open()
        head = b""
        for chunk in self._chunks:
            head += chunk
            if len(head) >= 4:
                break
        mark, self._encoding = next((found for found in _MARKS if head.startswith(found[0])), (b"", encoding))
        self._head = head[len(mark) :]
        self.start = len(mark)
        """The byte at which the text begins."""

    def width(self, text: str) -> int:
        """How many bytes of the file `text` takes."""
        return len(text) if self._encoding == "utf-8" and text.isascii() else len(text.encode(self._encoding))

    def pieces(self) -> Iterator[str]:
        """The text, piece by piece. Raises InvalidInput at bytes that are no text, after what comes before them."""
        decoder = codecs.getincrementaldecoder(self._encoding)()
        read = self.start
        for chunk in chain([self._head], self._chunks, [b""]):
            pending, _ = decoder.getstate()
            byte = read - len(pending)
            read += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk and chunk is not self._head)
            except UnicodeDecodeError as error:
                yield error.object[: error.start].decode(self._encoding)
                raise self._not_text(byte + error.start, error.object[error.start]) from None
            if "\0" in text:
                before, _, _ = text.partition("\0")
                yield before
                raise self._not_text(byte + self.width(before), 0)
            yield text

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line as UTF-8 with its newline, and the byte at which it begins.

        Only a line feed ends a line, or where the file begins without one, a carriage return. Lines of a file in UTF-8
        are as they are in it; `decoded` says whether one is text.
        """
        raw = self._encoding == "utf-8"
        chunks = chain([self._head], self._chunks) if raw else (piece.encode() for piece in self.pieces())
        end = b"\r" if b"\r" in self._head and b"\n" not in self._head else b"\n"
        byte = self.start
        held: list[bytes] = []
        for chunk in chunks:
            first, *following = chunk.split(end)
            held.append(first)
            for beginning in following:
                line = b"".join([*held, end])
                yield byte, line
                byte += len(line) if raw else self.width(line.decode())
                held = [beginning]
        if rest := b"".join(held):
            yield byte, rest

    def decoded(self, byte: int, line: bytes) -> str:
        """The text of a line that begins at that byte. Raises InvalidInput where it is none."""
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise self._not_text(byte + error.start, line[error.start]) from None
        if "\0" in text:
            raise self._not_text(byte + self.width(text.partition("\0")[0]), 0)
        return text

    def _not_text(self, byte: int, value: int) -> InvalidInput:
        name = self._encoding.upper().removesuffix("-LE").removesuffix("-BE")
        fault, advice = f"{self.filename} is not {name}: byte {byte} is 0x{value:02x}", "save it as UTF-8"
        sample, at = self._around(byte)
        found = likely_encodings(sample)
        if reading := as_read(sample, at, found):
            fault += f"; read as {reading}"
            advice = f"say which it is (--encoding {found[0]}), or save it as UTF-8"
        return InvalidInput("not_text", fault, advice)

    def _around(self, byte: int) -> tuple[bytes, int]:
        """What is on both sides of a byte, and where in it that is."""
        held, begin = b"", 0
        with contextlib.suppress(InvalidInput):
            for chunk in self._open():
                held += chunk
                if begin + len(held) > byte + _SAMPLE:
                    break
                cut = max(0, min(len(held), byte - _SAMPLE - begin)) // 4 * 4
                held, begin = held[cut:], begin + cut
        return held[: byte - begin + _SAMPLE], byte - begin


def _plain(path: Path, filename: str) -> Iterator[bytes]:
    """The bytes of the file in chunks that are never empty, as the others of its kind give them.

    They raise InvalidInput for a damaged or truncated file.
    """
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _gzip(path: Path, filename: str) -> Iterator[bytes]:
    """As gzip.open, but what comes before a fault is handed out before it is raised."""
    with open(path, "rb") as file:
        member, packed = None, b""
        while packed := packed or file.read(_PACKED_CHUNK):
            if member is None:
                packed = packed.lstrip(b"\0")
                member = zlib.decompressobj(wbits=31) if packed else None
                continue
            before = member.copy()
            try:
                content = member.decompress(packed, _CHUNK)
            except zlib.error as error:
                yield from _before_the_fault(before, packed)
                raise _damaged(filename, error) from None
            packed = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
            if content:
                yield content
        if member is not None:
            raise _damaged(filename, "it ends before its end-of-stream marker")


def _before_the_fault(member: Any, packed: bytes) -> Iterator[bytes]:
    for position in range(len(packed)):
        try:
            if content := member.decompress(packed[position : position + 1]):
                yield content
        except zlib.error:
            return


def _zstd(path: Path, filename: str) -> Iterator[bytes]:
    import pyarrow as arrow

    with open(path, "rb") as packed, arrow.CompressedInputStream(packed, "zstd") as file:
        try:
            while chunk := file.read(_PACKED_CHUNK):
                yield chunk
        except OSError as error:
            if error.errno is not None:
                raise
            raise _damaged(filename, error) from None


def _damaged(filename: str, error: Exception | str) -> InvalidInput:
    return InvalidInput(
        "damaged_file", f"the compressed data of {filename} is damaged or cut off: {error}", "copy the file again"
    )
