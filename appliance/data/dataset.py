"""A dataset on disk: its canonical rows, its report, and which rows are held out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

from appliance.errors import NotFound
from appliance.home import Home

Row = dict[str, Any]
Kind = Literal["messages", "preference", "unpaired"]

ROWS = "rows.jsonl"
OFFSETS = "rows.offsets"
REPORT = "report.json"
SOURCE = "source.json"

_ID = re.compile(r"[0-9a-f]{16}")


class RowWriter:
    """Writes rows.jsonl and rows.offsets, and knows the id that the rows give the dataset."""

    def __init__(self, lines: BinaryIO, offsets: BinaryIO) -> None:
        self._lines = lines
        self._offsets = offsets
        self._end = 0
        self._hash = hashlib.sha256()

    @classmethod
    @contextlib.contextmanager
    def into(cls, directory: Path) -> Iterator[RowWriter]:
        """A writer of the two files in `directory`, which are complete when the context ends."""
        with open(directory / ROWS, "wb") as lines, open(directory / OFFSETS, "wb") as offsets:
            yield cls(lines, offsets)

    @property
    def id(self) -> str:
        """Hash of the rows so far in their order, without where they came from."""
        return self._hash.hexdigest()[:16]

    def add(self, row: Row, canonical: bytes, source: dict[str, Any]) -> None:
        """Append `row`, whose `canonical_json` is `canonical`, with where it came from."""
        self._hash.update(canonical + b"\n")
        self._end += self._lines.write(json.dumps({**row, "source": source}, ensure_ascii=False).encode() + b"\n")
        self._offsets.write(struct.pack("=Q", self._end))


class Rows(Sequence[Row]):
    """The rows of rows.jsonl, each read when it is asked for.

    rows.offsets holds where each line ends, as 64-bit integers, so that any row is found in constant time.
    """

    def __init__(self, directory: Path) -> None:
        self._lines = _map(directory / ROWS)
        self._ends = memoryview(_map(directory / OFFSETS)).cast("Q")

    def __len__(self) -> int:
        return len(self._ends)

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
        start = self._ends[position - 1] if position else 0
        row: Row = json.loads(self._lines[start : self._ends[position]])
        return row


@dataclass(frozen=True)
class Dataset:
    """An immutable import. `report` is what became of each row of the source."""

    id: str
    kind: Kind
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
        return cls(id, report["kind"], Rows(directory), report)

    def split(self, eval_share: float) -> tuple[list[int], list[int]]:
        """Indices of the rows to train on and of those held out, each in the rows' order.

        Rows of one prompt fall on one side. Held out is the `eval_share` of the prompts whose hashes are
        lowest: at least one and never all, unless `eval_share` is 0 or there is one prompt only.
        """
        prompts = [prompt_hash(row) for row in self.rows]
        distinct = sorted(set(prompts))
        count = min(max(round(eval_share * len(distinct)), 1), len(distinct) - 1) if eval_share > 0 else 0
        held_out = set(distinct[:count])
        train = [index for index, prompt in enumerate(prompts) if prompt not in held_out]
        return train, [index for index, prompt in enumerate(prompts) if prompt in held_out]


def prompt_messages(row: Row) -> list[dict[str, Any]]:
    """What the answer of a row answers: `prompt`, or the messages before the last assistant turn."""
    if "prompt" in row:
        return list(row["prompt"])
    messages: list[dict[str, Any]] = row["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last]


def prompt_hash(row: Row) -> bytes:
    """The same 16 bytes for rows of the same prompt, on every machine."""
    return hashlib.sha256(canonical_json(prompt_messages(row))).digest()[:16]


def canonical_json(value: Any) -> bytes:
    """The one form in which a value is hashed: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
