"""Importing files: every row kept, or dropped for a reason; a whole dataset on disk, or none.

The daemon runs it as a process: `python -m appliance.data.importer HOME_ROOT REQUEST_JSON RESULT_JSON`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from appliance.data.account import SHOWN, Account, findings, place_name, stream_report
from appliance.data.columns import ColumnMap
from appliance.data.dataset import (
    ENTRY_FIELDS,
    INDEX,
    REPORT,
    ROWS,
    SOURCE,
    Rows,
    RowWriter,
    canonical_json,
    prompt_group,
    split,
)
from appliance.data.dataset_info import columns_of
from appliance.data.dropped import Dropped
from appliance.data.encoding import require_known
from appliance.data.fields import SPLIT, other_split
from appliance.data.formats import FORMATS, Canonical, to_canonical
from appliance.data.private import find_private, private_kinds, redact
from appliance.data.readers import Damaged, Record, read_records
from appliance.data.repeats import Repeats, Repetition
from appliance.data.requests import DROPS_RETURNED, ImportRequest, Source
from appliance.data.tokens import TokenCount, conversations, has_thoughts
from appliance.errors import ApplianceError, InvalidInput
from appliance.home import Home, building, disk_error, is_name, require_space, write_atomic, write_json

_EVAL_SHARE = 0.1
_SCRATCH_SHARE = 3
"""Space for the rows, what is noted of each while they are read, and the report, in sizes of the files."""


def import_files(request: ImportRequest, home: Home, scratch: Path | None = None) -> dict[str, Any]:
    """Import, with what is half-made under `scratch`, and return the report.

    Where a dataset of the same rows exists, only its report changes.
    Raises InvalidInput for a file, a name, a format or a column map that cannot be used, and NoSpace.
    """
    if not is_name(request.name):
        raise InvalidInput(
            "bad_name",
            f"a dataset cannot be called {request.name!r}",
            "name it with letters, digits, dots and dashes (--name)",
        )
    if request.drop_untrainable and request.base is None:
        raise InvalidInput(
            "no_base", "nothing says which base model the rows are to be trained on", "name one: --base or --recipe"
        )
    if request.format is not None and request.format not in FORMATS:
        raise InvalidInput(
            "bad_format", f"there is no format {request.format!r}", f"choose one of {', '.join(FORMATS)}"
        )
    for file in request.files:
        if not file.path.is_file():
            raise InvalidInput("unreadable_file", f"{file.filename} is not a file", "name a file")
    size = sum(file.path.stat().st_size for file in request.files)
    require_space(home.datasets, _SCRATCH_SHARE * size, "the import")
    try:
        with (
            tempfile.TemporaryDirectory(dir=scratch or home.incoming) as folder,
            open(Path(folder) / "drops", "wb") as drops,
            contextlib.ExitStack() as stack,
        ):
            return _Import(request, Path(folder), drops, stack).run(home)
    except OSError as error:
        raise disk_error(error, home.root) from error


class _Import:
    """One import, its files half-made in `scratch`."""

    def __init__(self, request: ImportRequest, scratch: Path, drops: BinaryIO, stack: contextlib.ExitStack) -> None:
        self.request = request
        self.scratch = scratch
        self.columns = ColumnMap(request.columns) if request.columns is not None else None
        self.ignored = frozenset(request.ignore)
        others = [file.filename for file in request.files if other_split(file.filename)]
        self.other_splits = frozenset(others if len(others) < len(request.files) and SPLIT not in self.ignored else ())
        self.encoding = require_known(request.encoding)
        self.account = Account(drops)
        self.repetition = Repetition(scratch, stack)
        self.tokens = TokenCount(request.base) if request.base else None
        if self.tokens:
            stack.callback(self.tokens.close)

    def run(self, home: Home) -> dict[str, Any]:
        names = ", ".join(_shown(file.filename) for file in self.request.files[:3])
        names += f" and {len(self.request.files) - 3} more" if len(self.request.files) > 3 else ""
        with RowWriter.into(self.scratch) as writer:
            for file in self.request.files:
                self._read(file, writer)
        if self.columns and self.account.rows_in:
            self.columns.check(names)
        self.account.check(names)
        report = {"id": writer.id, "name": self.request.name, **self.account.figures()}
        repeats = self.repetition.finish(numpy.fromfile(self.scratch / INDEX, ENTRY_FIELDS)["group"].copy())
        index = numpy.fromfile(self.scratch / INDEX, ENTRY_FIELDS)
        index["group"] = repeats.groups
        index.tofile(self.scratch / INDEX)
        del index
        report |= self._repeats(repeats)
        if self.tokens:
            report["tokens"] = self.tokens.figures(self.request.max_length)
            untrainable = report["tokens"].pop("refused_rows")
            rows = Rows(self.scratch)
            report["untrainable"] = [
                {**rows[row]["source"], "code": code, "reason": reason} for row, code, reason in untrainable
            ]
        report["findings"] = findings(report, self.account, self.request.redact)
        self.account.drops.flush()
        stream_report(report, self.scratch / "drops", self.scratch / REPORT)
        provenance = {"files": [_provenance(file) for file in self.request.files]}
        _keep(self.scratch, home.datasets / writer.id, provenance)
        with open(self.scratch / "drops", "rb") as drops:
            shown = [json.loads(line) for line, _ in zip(drops, range(DROPS_RETURNED), strict=False)]
        return {**report, "drops": shown}

    def _read(self, file: Source, writer: RowWriter) -> None:
        """Write the rows of a file, each once."""
        filename = _shown(file.filename)
        among = {"file": filename} if len(self.request.files) > 1 else {}
        is_row = self._is_row if self.request.salvage else None
        named = columns_of(file.about, filename)
        self._columns = self.columns or (ColumnMap(named) if named else None)
        for record in read_records(file.path, filename, is_row, self.encoding):
            self.account.rows_in += 1
            place = {**record.place, **among}
            if isinstance(record, Damaged):
                lost = f"{record.bytes} bytes were lost" if record.bytes is not None else "all after it was lost"
                self.account.drop(place, Dropped("damaged", f"{record.error.message}; {lost}"))
                continue
            try:
                if file.filename in self.other_splits:
                    split = other_split(file.filename)
                    raise Dropped("other_split", f"the file is of the split {split!r} (--ignore split takes it too)")
                self._take(record, place, filename, writer)
            except Dropped as drop:
                self.account.drop(place, drop)

    def _is_row(self, value: Any) -> bool:
        try:
            to_canonical(self._renamed(value), self.request.format, self.ignored)
        except Dropped:
            return False
        return True

    def _renamed(self, value: Any) -> Any:
        return self._columns.rename(value) if self._columns else value

    def _take(self, record: Record, place: dict[str, Any], filename: str, writer: RowWriter) -> None:
        value = self._renamed(record.value)
        found = to_canonical(value, self.request.format, self.ignored)
        row, canonical = found.row, _canonical_bytes(found)
        if kinds := private_kinds(canonical):
            private = find_private(row, kinds)
            if private:
                self.account.private += private
                if len(self.account.private_rows) < SHOWN:
                    self.account.private_rows.append(place_name(place))
                if self.request.redact:
                    row = redact(row, kinds)
                    canonical = canonical_json(row)
        if self.tokens and self.request.drop_untrainable and (refusal := self.tokens.refusal(row)):
            raise Dropped(refusal.code, f"{refusal.message}: {self.tokens.base} cannot be trained on it")
        self.account.recognise(place, value, found)
        digest = hashlib.sha256(canonical).digest()[:16]
        if not self.repetition.is_new(digest):
            self.account.duplicates += 1
            return
        writer.add(canonical, digest, prompt_group(row), {"file": filename, **record.place})
        self.repetition.add(row)
        if self.tokens:
            self.tokens.add(row, canonical)
        self.account.kept += 1
        self.account.thoughts += any(map(has_thoughts, conversations(row)))

    def _repeats(self, repeats: Repeats) -> dict[str, Any]:
        """The figures of repeated rows, with examples by their places in the files."""
        rows = Rows(self.scratch)
        train, held_out = split(repeats.groups, _EVAL_SHARE, rows.files())
        both = numpy.isin(repeats.questions[held_out], repeats.questions[train])

        def place(row: int) -> str:
            where = rows[row]["source"]
            return place_name(where if len(self.request.files) > 1 else {**where, "file": ""})

        return {
            "near_duplicates": repeats.near,
            "near": [[place(one), place(other), round(share, 2)] for one, other, share in repeats.pairs],
            "conflicts": repeats.conflicts,
            "conflicting": [place(row) for row in repeats.conflicting],
            "questions_on_both_sides": int(both.sum()),
        }


def _canonical_bytes(found: Canonical) -> bytes:
    try:
        return canonical_json(found.row)
    except UnicodeEncodeError:
        raise Dropped("broken_text", "a text holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise Dropped("too_deep", "it is nested too deeply") from None


def _keep(scratch: Path, final: Path, provenance: dict[str, Any]) -> None:
    """Make the directory of a dataset from the files in `scratch`; one that is there gets the newer report."""
    with _one_at_a_time(final.parent):
        if final.exists():
            write_atomic(final / REPORT, (scratch / REPORT).read_bytes())
            write_json(final / SOURCE, provenance)
            return
        with building(final) as directory:
            for file in (ROWS, INDEX, REPORT):
                os.rename(scratch / file, directory / file)
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


def _provenance(source: Source) -> dict[str, Any]:
    with open(source.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": _shown(source.filename), "bytes": source.path.stat().st_size, "sha256": digest}


def _shown(filename: str) -> str:
    return filename.encode(errors="replace").decode()


def main(home_root: Path, request: Path, result: Path) -> None:
    """Import as the file `request` says; what came of it is in `result` as {"report"} or {"problem"}."""
    try:
        report = import_files(ImportRequest.model_validate_json(request.read_bytes()), Home(home_root), result.parent)
        outcome: dict[str, Any] = {"report": report}
    except ApplianceError as error:
        outcome = {"problem": error.problem()}
    write_json(result, outcome)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
