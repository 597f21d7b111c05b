"""From a file to its text: decompressed, decoded, and every fault at its byte."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from appliance.errors import InvalidInput

COMPRESSED = (".gz", ".zst")

_CHUNK = 1 << 20

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class SourceText:
    """The text of the file at `path`, which its owner calls `filename`, read once and in pieces.

    A name that ends in .gz or .zst is decompressed; bytes are then counted in what comes out. A byte order mark says
    the encoding and is no text; without one it is UTF-8.
    """

    def __init__(self, path: Path, filename: str) -> None:
        self.filename = filename
        self._chunks = _unpacked(path, filename)
        head = b""
        for chunk in self._chunks:
            head += chunk
            if len(head) >= 4:
                break
        mark, self._encoding = next((found for found in _MARKS if head.startswith(found[0])), (b"", "utf-8"))
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

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line with its newline, and the byte at which it begins. Only a line feed ends a line."""
        byte = self.start
        held: list[str] = []
        for piece in self.pieces():
            first, *following = piece.split("\n")
            held.append(first)
            for beginning in following:
                line = "".join([*held, "\n"])
                yield byte, line
                byte += self.width(line)
                held = [beginning]
        if rest := "".join(held):
            yield byte, rest

    def _not_text(self, byte: int, value: int) -> InvalidInput:
        return InvalidInput(
            "not_text",
            f"{self.filename} is not {self._encoding[:6].rstrip('-').upper()}: byte {byte} is 0x{value:02x}",
            "save it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8`",
        )


def _unpacked(path: Path, filename: str) -> Iterator[bytes]:
    """The bytes of the file, in chunks that are never empty. Raises InvalidInput for a damaged or truncated one."""
    extension = Path(filename).suffix.lower()
    unpack = {".gz": _gzip, ".zst": _zstd}.get(extension, _plain)
    return unpack(path, filename)


def _plain(path: Path, filename: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _gzip(path: Path, filename: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        try:
            while chunk := file.read(_CHUNK):
                yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(filename, error) from None


def _zstd(path: Path, filename: str) -> Iterator[bytes]:
    import pyarrow as arrow

    with open(path, "rb") as packed, arrow.CompressedInputStream(packed, "zstd") as file:
        try:
            while chunk := file.read(_CHUNK):
                yield chunk
        except OSError as error:
            if error.errno is not None:
                raise
            raise _damaged(filename, error) from None


def _damaged(filename: str, error: Exception) -> InvalidInput:
    return InvalidInput(
        "damaged_file", f"the compressed data of {filename} is damaged or cut off: {error}", "copy the file again"
    )
