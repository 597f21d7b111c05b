"""A dataset on disk: its canonical rows, its report, and which rows are held out."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from appliance.errors import NotFound
from appliance.home import Home

Row = dict[str, Any]
Kind = Literal["messages", "preference"]

ROWS = "rows.jsonl"
OFFSETS = "rows.offsets"
REPORT = "report.json"
SOURCE = "source.json"

_ID = re.compile(r"[0-9a-f]{16}")
_OFFSET_BYTES = 8


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


def write_rows(directory: Path, rows: Sequence[Row]) -> None:
    """Write rows.jsonl and rows.offsets into `directory`."""
    ends = array("Q")
    end = 0
    with open(directory / ROWS, "wb") as file:
        for row in rows:
            end += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            ends.append(end)
    (directory / OFFSETS).write_bytes(ends.tobytes())


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
