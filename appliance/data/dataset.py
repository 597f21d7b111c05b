"""A dataset on disk: its canonical rows, its report, and which rows are held out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import re
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import orjson

from appliance.errors import InvalidInput, NotFound
from appliance.home import Home

Row = dict[str, Any]
Kind = Literal["messages", "preference", "unpaired"]

ROWS = "rows.jsonl"
INDEX = "rows.index"
REPORT = "report.json"
SOURCE = "source.json"

_ID = re.compile(r"[0-9a-f]{16}")
_UNSPOKEN = re.compile(r"[^\w\0]+|_+")
_UNSPOKEN_ASCII = bytes(byte for byte in range(1, 128) if not chr(byte).isalnum())


ENTRY = struct.Struct("<QQQ")
"""An entry of rows.index: where the row's line ends, 64 bits of its hash, and its group."""
ENTRY_FIELDS = [("end", "<u8"), ("digest", "<u8"), ("group", "<u8")]
"""The same for numpy. Rows of one group are never parted by a split."""


class RowWriter:
    """Writes rows.jsonl and rows.index, and knows the id that the rows give the dataset."""

    def __init__(self, lines: BinaryIO, index: BinaryIO) -> None:
        self._lines = lines
        self._index = index
        self._end = 0
        self._hash = hashlib.sha256()

    @classmethod
    @contextlib.contextmanager
    def into(cls, directory: Path) -> Iterator[RowWriter]:
        """A writer of the two files in `directory`, which are complete when the context ends."""
        with open(directory / ROWS, "wb") as lines, open(directory / INDEX, "wb") as index:
            yield cls(lines, index)

    @property
    def id(self) -> str:
        """Hash of the rows so far in their order, without where they came from."""
        return self._hash.hexdigest()[:16]

    def add(self, canonical: bytes, digest: bytes, group: int, source: dict[str, Any]) -> None:
        """Append the row whose `canonical_json` is `canonical`, with where it came from."""
        self._hash.update(canonical + b"\n")
        self._end += self._lines.write(canonical[:-1] + b',"source":' + orjson.dumps(source) + b"}\n")
        self._index.write(ENTRY.pack(self._end, int.from_bytes(digest[:8], "little"), group))


class Rows(Sequence[Row]):
    """The rows of rows.jsonl, each read when it is asked for; rows.index finds any of them in constant time."""

    def __init__(self, directory: Path) -> None:
        self._lines = _map(directory / ROWS)
        self._index = _map(directory / INDEX)

    def __len__(self) -> int:
        return len(self._index) // ENTRY.size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        start = self._end(position - 1) if position else 0
        row: Row = json.loads(self._lines[start : self._end(position)])
        return row

    def _end(self, position: int) -> int:
        end: int = ENTRY.unpack_from(self._index, position * ENTRY.size)[0]
        return end


@dataclass(frozen=True)
class Dataset:
    """An immutable import. `report` is what became of each row of the source."""

    id: str
    kind: Kind
    directory: Path
    rows: Rows
    report: dict[str, Any]

    @classmethod
    def open(cls, home: Home, id: str) -> Dataset:
        """The dataset with that id. Raises NotFound."""
        directory = home.datasets / id
        if not _ID.fullmatch(id) or not directory.is_dir():
            raise NotFound(
                "no_such_dataset",
                f"no dataset has the id {id}",
                "see `appliance data list`",
            )
        report = json.loads((directory / REPORT).read_bytes())
        return cls(id, report["kind"], directory, Rows(directory), report)

    def require_sound(self, base: str, name: str = "") -> None:
        """Raise InvalidInput where the report has an error that holds for this base model."""
        for finding in self.report.get("findings", ()):
            if finding["level"] == "error" and finding.get("base", base) == base:
                fault = f"dataset {name or self.id} cannot be trained on: {finding['message']}"
                raise InvalidInput("dataset_has_errors", fault, "mend the rows and import them again")

    def index(self) -> Any:
        """rows.index as a numpy array of ENTRY_FIELDS."""
        import numpy

        return numpy.fromfile(self.directory / INDEX, ENTRY_FIELDS)

    def split(self, eval_share: float) -> tuple[list[int], list[int]]:
        """Indices of the rows to train on and of those held out, as `split` says."""
        train, held_out = split(self.index()["group"], eval_share)
        return train.tolist(), held_out.tolist()


def split(groups: Any, eval_share: float) -> tuple[Any, Any]:
    """Indices of the rows to train on and of those held out, each in the rows' order, of [n] u64 groups.

    A group falls on one side. Held out are the groups of the lowest hashes, as many as together hold at most
    `eval_share` of the rows, but at least one group; none where `eval_share` is 0 or there is one group only.
    """
    import numpy

    distinct, sizes = numpy.unique(groups, return_counts=True)
    chosen = []
    if eval_share > 0 and len(distinct) > 1:
        room = round(eval_share * len(groups))
        for group, size in zip(distinct[:-1], sizes[:-1], strict=True):
            if size <= room:
                chosen.append(group)
                room -= size
            if not room:
                break
        chosen = chosen or [distinct[0]]
    held_out = numpy.isin(groups, numpy.array(chosen, dtype="<u8"))
    return numpy.flatnonzero(~held_out), numpy.flatnonzero(held_out)


def compare(one: Dataset, other: Dataset) -> tuple[list[int], list[int], int]:
    """Indices of the rows that only `one` has, of those that only `other` has, and how many both have."""
    import numpy

    keys = [dataset.index()["digest"] for dataset in (one, other)]
    shared = numpy.isin(keys[0], keys[1])
    only_other = numpy.flatnonzero(~numpy.isin(keys[1], keys[0]))
    return numpy.flatnonzero(~shared).tolist(), only_other.tolist(), int(shared.sum())


def prompt_messages(row: Row) -> list[dict[str, Any]]:
    """What the answer of a row answers: `prompt`, or the messages before the last assistant turn."""
    if "prompt" in row:
        return list(row["prompt"])
    messages: list[dict[str, Any]] = row["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last]


def prompt_group(row: Row) -> int:
    """The same 64 bits for rows whose prompts differ in nothing but case, spacing and punctuation."""
    said = spoken(prompt_messages(row))
    if said.isascii():
        return text_hash(said.encode().lower().translate(None, _UNSPOKEN_ASCII))
    return text_hash(_UNSPOKEN.sub("", unicodedata.normalize("NFKC", said).casefold()).encode())


def spoken(messages: list[dict[str, Any]]) -> str:
    """Who says what in `messages`, as one text."""
    return "\0".join([f"{message['role']}\0{message['content']}" for message in messages])


def text_hash(text: bytes) -> int:
    """64 bits of a hash, never 0."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def canonical_json(value: Any) -> bytes:
    """The one form in which a value is hashed: sorted keys, no spaces, UTF-8."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # integers beyond 64 bits; what is no text is then a UnicodeEncodeError
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
