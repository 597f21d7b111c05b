"""A dataset's rows as a method's examples, tokenised once for a base and kept beside the dataset, mapped from there."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.compute
from datasets import Dataset as Table

from appliance.data.dataset import Dataset
from appliance.data.tokenizer import TemplateSettings, load_tokenizer
from appliance.errors import InvalidInput
from appliance.home import Home, fsync_directory
from appliance.train.recipe import Stage
from appliance.train.rows import Example, place

FOLDER = "tokens"
KEPT = 4
"""Files of tokens beside a dataset: for so many bases and methods, the last used."""
ROWS_AT_ONCE = 1000
_ABOUT = ("row", "length", "trained", "refused")
"""Columns beside those that the method's trainer reads."""
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
_CODE = ("data/render.py", "data/template_input.py", "data/thoughts.py", "train/rows.py")
"""What examples follow from beside the method's own module; other code makes other files of tokens."""


@dataclass(frozen=True)
class Examples:
    """Examples in an order of their own, of which none is in memory until it is asked for."""

    table: Table
    """Columns named as the method's trainer reads them."""
    lengths: list[int]
    """Tokens of the longest sequence of each."""
    trained: list[int]
    """Trained tokens of each."""

    @classmethod
    def of(cls, examples: Sequence[Example], method: Any) -> Examples:
        """Examples that are in memory."""
        lengths, trained = (list(map(count, examples)) for count in (method.length, method.trained))
        return cls(Table.from_list(list(examples)), lengths, trained)

    def __len__(self) -> int:
        return len(self.lengths)

    def by_length(self) -> Examples:
        """The same, the shortest first."""
        order = numpy.argsort(numpy.array(self.lengths), kind="stable").tolist()
        lengths, trained = ([counts[at] for at in order] for counts in (self.lengths, self.trained))
        return Examples(self.table.select(order), lengths, trained)


@dataclass(frozen=True)
class _Work:
    """What a process is told that tokenises rows."""

    home: Path
    dataset: str
    base: Path
    template: TemplateSettings
    method: str
    at_once: int
    """Rows of a batch."""


def tokenised(home: Home, dataset: Dataset, base: Path, template: TemplateSettings, method: str) -> pyarrow.Table:
    """The examples of all rows of `dataset` by the method of that name, with _ABOUT, mapped from disk.

    `row` is the row's index; a row that cannot be trained on has its error in `refused`, as JSON, and nothing else.
    """
    folder = dataset.directory / FOLDER
    path = folder / f"{_key(dataset, base, template, method)}.arrow"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        _write(path, dataset, _Work(home.root, dataset.id, base, template, method, ROWS_AT_ONCE))
    os.utime(path)
    for older in sorted(folder.glob("*.arrow"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
        older.unlink(missing_ok=True)
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()


def chosen(table: pyarrow.Table, dataset: Dataset, rows: Sequence[int], stage: Stage) -> tuple[Examples, int]:
    """The examples of `rows` in their order, and how many rows were left out because they are too long.

    Raises InvalidInput naming the row that cannot be trained on, or how many rows are longer than `stage.max_length`
    unless `stage.drop_long`.
    """
    begins = numpy.searchsorted(table["row"].to_numpy(), numpy.arange(len(dataset.rows) + 1))
    lengths = table["length"].to_numpy()
    refused = ~table["refused"].is_null().to_numpy()
    kept: list[int] = []
    too_long: list[tuple[int, int]] = []
    for row in rows:
        positions = range(begins[row], begins[row + 1])
        if any(refused[at] for at in positions):
            error = json.loads(table["refused"][positions[0]].as_py())
            where = place(row, dataset.rows[row])
            raise InvalidInput(error["code"], f"{where}: {error['message']}", error["next"])
        longest = max((int(lengths[at]) for at in positions), default=0)
        if longest > stage.max_length:
            too_long.append((longest, row))
        else:
            kept += positions
    if too_long and not stage.drop_long:
        longest, row = max(too_long)
        raise InvalidInput(
            "row_too_long",
            f"{len(too_long)} rows are longer than max_length = {stage.max_length} tokens; "
            f"the longest is {place(row, dataset.rows[row])} with {longest}",
            f"set max_length = {longest}, or drop_long = true to leave them out",
        )
    counts = (table[name].to_numpy()[kept].tolist() for name in ("length", "trained"))
    return Examples(Table(table.drop_columns(list(_ABOUT))).select(kept), *counts), len(too_long)


def _key(dataset: Dataset, base: Path, template: TemplateSettings, method: str) -> str:
    """A hash of all that the examples follow from."""
    today = template.today if _asks_for_today(base) else None
    digest = hashlib.sha256(f"{dataset.id} {method} {today} {template.thinking}".encode())
    here = Path(__file__).parents[1]
    code = [here / name for name in (*_CODE, f"train/{method}.py", "train/examples.py")]
    files = sorted({file for pattern in _TOKENIZER_FILES for file in base.glob(pattern)})
    for file in (*code, *files):
        with open(file, "rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:24]


def _asks_for_today(base: Path) -> bool:
    return any(b"strftime_now" in file.read_bytes() for file in base.glob("*") if file.suffix in (".json", ".jinja"))


def _write(path: Path, dataset: Dataset, work: _Work) -> None:
    """Tokenise all rows into `path`, whole or not at all; many, in as many processes as there are cores."""
    starts = range(0, len(dataset.rows), work.at_once)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        writer = None
        with pyarrow.OSFile(str(temporary), "wb") as sink:
            for batch in _batches(work, starts):
                writer = writer or pyarrow.ipc.new_file(sink, batch.schema)
                writer.write_batch(batch)
            if writer is not None:
                writer.close()
            sink.flush()
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _batches(work: _Work, starts: Sequence[int]) -> Iterator[pyarrow.RecordBatch]:
    cores = len(os.sched_getaffinity(0))
    if len(starts) < 2 or cores < 2:
        begin = _Tokeniser(work)
        yield from map(begin, starts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, _prepare, (work,)) as pool:
        yield from pool.map(_tokenise, starts)


class _Tokeniser:
    """Makes batches of rows."""

    def __init__(self, work: _Work) -> None:
        from appliance.train.stage import METHODS

        self.method, self.at_once = METHODS[work.method], work.at_once
        self.rows = Dataset.open(Home(work.home), work.dataset).rows
        self.tokenizer = load_tokenizer(work.base, work.template)

    def __call__(self, start: int) -> pyarrow.RecordBatch:
        found: list[dict[str, Any]] = []
        for row in range(start, min(start + self.at_once, len(self.rows))):
            try:
                examples = self.method.examples(self.tokenizer, self.rows[row])
            except InvalidInput as error:
                said = {"code": error.code, "message": error.message, "next": error.next}
                found.append({"row": row, "refused": json.dumps(said)})
                continue
            found += [
                {**one, "row": row, "length": self.method.length(one), "trained": self.method.trained(one)}
                for one in examples
            ]
        return pyarrow.RecordBatch.from_pylist(found, schema=self._schema())

    def _schema(self) -> pyarrow.Schema:
        number, ids = pyarrow.int32(), pyarrow.list_(pyarrow.int32())
        kinds = {name: pyarrow.bool_() if name == "label" else ids for name in self.method.columns}
        about = {"row": number, "length": number, "trained": number, "refused": pyarrow.string()}
        return pyarrow.schema(list((kinds | about).items()))


_tokeniser: _Tokeniser | None = None
"""Of a process of the pool."""


def _prepare(work: _Work) -> None:
    global _tokeniser
    _tokeniser = _Tokeniser(work)


def _tokenise(start: int) -> pyarrow.RecordBatch:
    assert _tokeniser is not None
    return _tokeniser(start)
