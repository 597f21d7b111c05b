"""Importing a file: every row kept, or dropped for a reason; a whole dataset on disk, or none.

The daemon runs it as a process: `python -m appliance.data.importer SOURCE FILENAME NAME HOME_ROOT RESULT_JSON`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.data.columns import ColumnMap
from appliance.data.dataset import OFFSETS, REPORT, ROWS, SOURCE, RowWriter, canonical_json
from appliance.data.formats import FORMATS, Canonical, Dropped, to_canonical
from appliance.data.readers import Record, read_records
from appliance.errors import ApplianceError, InvalidInput
from appliance.home import NAME_PATTERN, Home, building, disk_error, require_space, write_json


def import_file(
    source: Path, filename: str, name: str, home: Home, format: str | None = None, columns: str | None = None
) -> dict[str, Any]:
    """Import the file at `source`, which its owner calls `filename`, and return the report.

    `columns` renames the rows' keys, as ColumnMap says. Where a dataset of the same rows exists, it stays as it is.
    Raises InvalidInput for a file, a name, a format or a column map that cannot be used, and NoSpace.
    """
    if not re.match(NAME_PATTERN, name):
        raise InvalidInput(
            "bad_name", f"a dataset cannot be called {name!r}", "name it with letters, digits, dots and dashes (--name)"
        )
    if format is not None and format not in FORMATS:
        raise InvalidInput("bad_format", f"there is no format {format!r}", f"choose one of {', '.join(FORMATS)}")
    column_map = ColumnMap(columns) if columns is not None else None
    filename = filename.encode(errors="replace").decode()
    if not source.is_file():
        raise InvalidInput("unreadable_file", f"{filename} is not a file", "name a file")
    require_space(home.datasets, 2 * source.stat().st_size, "the import")
    try:
        with tempfile.TemporaryDirectory(dir=home.incoming) as scratch:
            with RowWriter.into(Path(scratch)) as writer:
                records = read_records(source, filename)
                account = _import_rows(records, filename, format, column_map, writer)
            if column_map and account.rows_in:
                column_map.check(filename)
            account.check(filename)
            report = {"id": writer.id, "name": name, **account.report()}
            _keep(Path(scratch), home.datasets / writer.id, report, _provenance(source, filename))
    except OSError as error:
        raise disk_error(error, home.root) from error
    return report


@dataclass
class _Account:
    """What became of the rows so far."""

    rows_in: int = 0
    kept: int = 0
    duplicates: int = 0
    trimmed: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, str] = field(default_factory=dict)
    """Kinds of rows seen, each with the place of its first."""
    drops: list[dict[str, Any]] = field(default_factory=list)

    def check(self, filename: str) -> None:
        """Raise InvalidInput where the rows make no dataset."""
        if not self.rows_in:
            raise InvalidInput("no_rows", f"{filename} holds no rows", "choose a file with rows in it")
        if not self.kept:
            first = self.drops[0]
            raise InvalidInput(
                "no_rows_kept",
                f"none of the {self.rows_in} rows of {filename} can be used; the first, {_place(first)}: "
                f"{first['reason']}",
                f"mend the rows, name their format (--format {'|'.join(FORMATS)}) or their columns (--map)",
            )
        if len(self.kinds) > 1:
            places = " and ".join(f"{kind} rows (first at {place})" for kind, place in self.kinds.items())
            raise InvalidInput("mixed_kinds", f"{filename} holds {places}", "put each kind into a file of its own")

    def report(self) -> dict[str, Any]:
        """The report of an account that passed `check`: rows_in == kept + dropped + duplicates."""
        findings = []
        if self.trimmed:
            message = f"{self.trimmed} rows had white space around an answer; it was taken off"
            findings.append({"level": "note", "code": "trimmed_answers", "message": message})
        return {
            "format": dict(self.formats),
            "kind": next(iter(self.kinds)),
            "rows_in": self.rows_in,
            "kept": self.kept,
            "dropped": len(self.drops),
            "duplicates": self.duplicates,
            "drops": self.drops,
            "findings": findings,
        }


def _import_rows(
    records: Iterator[Record], filename: str, format: str | None, column_map: ColumnMap | None, writer: RowWriter
) -> _Account:
    """Write the rows that `records` are, each once."""
    account = _Account()
    seen: set[bytes] = set()
    for record in records:
        account.rows_in += 1
        try:
            value = column_map.rename(record.value) if column_map else record.value
            found = to_canonical(value, format)
            canonical = _canonical_bytes(found)
        except Dropped as drop:
            account.drops.append({**record.place, "code": drop.code, "reason": drop.reason})
            continue
        account.formats[found.format] += 1
        account.kinds.setdefault("preference" if "prompt" in found.row else "messages", _place(record.place))
        account.trimmed += found.trimmed
        digest = hashlib.sha256(canonical).digest()[:16]
        if digest in seen:
            account.duplicates += 1
            continue
        seen.add(digest)
        writer.add(found.row, canonical, {"file": filename, **record.place})
        account.kept += 1
    return account


def _canonical_bytes(found: Canonical) -> bytes:
    try:
        return canonical_json(found.row)
    except UnicodeEncodeError:
        raise Dropped("broken_text", "a text holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise Dropped("too_deep", "it is nested too deeply") from None


def _keep(scratch: Path, final: Path, report: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Make the directory of a dataset from the rows in `scratch`, unless there is one."""
    with _one_at_a_time(final.parent):
        if final.exists():
            return
        with building(final) as directory:
            for file in (ROWS, OFFSETS):
                os.rename(scratch / file, directory / file)
            write_json(directory / REPORT, report)
            write_json(directory / SOURCE, provenance)


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Wait until no other import is moving a dataset into `directory`."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _provenance(source: Path, filename: str) -> dict[str, Any]:
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": filename, "bytes": source.stat().st_size, "sha256": digest}


def _place(where: dict[str, Any]) -> str:
    return f"line {where['line']}" if "line" in where else f"index {where['index']}"


def main() -> None:
    """Import as the arguments say; what came of it is in RESULT_JSON as {"report"} or {"problem"}."""
    parser = argparse.ArgumentParser(prog="python -m appliance.data.importer")
    parser.add_argument("source", type=Path)
    parser.add_argument("filename")
    parser.add_argument("name")
    parser.add_argument("home_root", type=Path)
    parser.add_argument("result_json", type=Path)
    parser.add_argument("--format")
    parser.add_argument("--map", dest="columns")
    given = parser.parse_args()
    try:
        home = Home(given.home_root)
        report = import_file(given.source, given.filename, given.name, home, given.format, given.columns)
        outcome: dict[str, Any] = {"report": report}
    except ApplianceError as error:
        problem = {"code": error.code, "message": error.message, "next": error.next, "status": error.status}
        outcome = {"problem": problem}
    write_json(given.result_json, outcome)


if __name__ == "__main__":
    main()
