"""A dataset on disk: its canonical rows, its report, and which rows are held out."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
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

HELD_OUT_AT_MOST = 256
"""Rows that a split holds out at most, because more would say little more: the interval of a mean over so many is an
eighth of what the rows differ by."""


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

    def files(self) -> Any:
        """[n] of each row the number of the source file that it came from; the rows of a file stand together."""
        import numpy

        found, numbers = numpy.zeros(len(self), numpy.int64), dict[str, int]()
        begin = 0
        while begin < len(self):
            end = self._end_of_file(begin)
            found[begin:end] = numbers.setdefault(self._file(begin), len(numbers))
            begin = end
        return found

    def _end_of_file(self, begin: int) -> int:
        """Where the rows of the file that row `begin` came from end."""
        name, step = self._file(begin), 1
        while begin + step < len(self) and self._file(begin + step) == name:
            step *= 2
        some = range(begin + step // 2, min(begin + step, len(self)))
        return some.start + bisect.bisect_left(some, True, key=lambda row: self._file(row) != name)

    def _file(self, position: int) -> str:
        return str(self[position].get("source", {}).get("file", ""))

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
        """Indices of the rows to train on, in their order, and of those held out, in the order that `split` says.

        What needs fewer of the held-out rows takes the first: any number of them is a draw from all files.
        """
        train, held_out = split(self.index()["group"], eval_share, self.rows.files())
        return train.tolist(), held_out.tolist()


def split(groups: Any, eval_share: float, files: Any) -> tuple[Any, Any]:
    """Indices of the rows to train on and of those held out, of [n] u64 groups in [n] numbered source files.

    A group falls on one side; its file is that of its first row. Held out are the groups that `_stratified` puts first,
    of each file the same share, as many as hold `eval_share` of the rows and at most HELD_OUT_AT_MOST. The first of
    each file of several groups is among them as far as there is room, and one group in any case; none where
    `eval_share` is 0 or there is one group only. Rows to train on come in their order, those held out in that of their
    groups.
    """
    import numpy

    distinct, first, sizes = numpy.unique(groups, return_index=True, return_counts=True)
    if not eval_share or len(distinct) < 2:
        return numpy.arange(len(groups)), numpy.array([], numpy.int64)
    order, firsts = _stratified(files[first], sizes)
    room, smallest = min(round(eval_share * len(groups)), HELD_OUT_AT_MOST), sizes.min()
    chosen: set[int] = set()
    for group in itertools.chain(firsts, order[:-1]):
        if room < smallest:
            break
        if sizes[group] <= room and group not in chosen:
            chosen.add(group)
            room -= sizes[group]
    chosen = chosen or {order[0]}
    is_held_out = numpy.isin(groups, distinct[list(chosen)])
    rows = numpy.flatnonzero(is_held_out)
    place = numpy.empty_like(order)
    place[order] = numpy.arange(len(order))
    by_place = numpy.argsort(place[numpy.searchsorted(distinct, groups[rows])], kind="stable")
    return numpy.flatnonzero(~is_held_out), rows[by_place]


def _stratified(files: Any, sizes: Any) -> tuple[Any, Any]:
    """Indices of [n] groups, given by their hash with file and number of rows, in an order of which any beginning is a
    draw of the same share of each file; and the first group of each file of several, in the same order.

    Hashes are a random order that does not depend on that of the rows. A group stands at the share of its file's rows
    whose groups have lower hashes, half of its own included.
    """
    import numpy

    by_file = numpy.argsort(files, kind="stable")
    rows_of = numpy.bincount(files, sizes)
    begin_of = numpy.cumsum(rows_of) - rows_of
    middle = numpy.cumsum(sizes[by_file]) - sizes[by_file] / 2
    share = numpy.empty(len(files))
    share[by_file] = (middle - begin_of[files[by_file]]) / rows_of[files[by_file]]
    _, first, count = numpy.unique(files, return_index=True, return_counts=True)
    several = first[count > 1]
    return numpy.argsort(share, kind="stable"), several[numpy.argsort(share[several], kind="stable")]


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


def answered(row: Row, part: str) -> list[dict[str, Any]]:
    """The conversation of a row's prompt and the answer that is its `part`, of which only that answer is trained."""
    prompt = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in row["prompt"]]
    return [*prompt, *row[part]]


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
