from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import Import
from test_data_importer import ALPACA, pass_through

import appliance.data.text as text_module
from appliance.data.readers import read_records
from appliance.errors import InvalidInput

Rows = list[dict[str, str]]


def zstd(content: bytes) -> bytes:
    held = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(held, "zstd") as packed:
        packed.write(content)
    return bytes(held.getvalue())


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: Rows, delimiter: str) -> bytes:
    held = io.StringIO(newline="")
    writer = csv.DictWriter(held, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return held.getvalue().encode()


def parquet_file(rows: list[Any]) -> bytes:
    held = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), held)
    return held.getvalue()


def arrow_stream(rows: list[Any]) -> bytes:
    return _arrow(rows, arrow.ipc.new_stream)


def arrow_file(rows: list[Any]) -> bytes:
    return _arrow(rows, arrow.ipc.new_file)


def _arrow(rows: list[Any], writer: Any) -> bytes:
    held, held_rows = io.BytesIO(), arrow.Table.from_pylist(rows)
    with writer(held, held_rows.schema) as into:
        into.write_table(held_rows, max_chunksize=1)
    return held.getvalue()


PLAIN: dict[str, Callable[[Rows], bytes]] = {
    "jsonl": json_lines,
    "ndjson": json_lines,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": lambda rows: table(rows, ","),
    "tsv": lambda rows: table(rows, "\t"),
}
CONTAINERS: dict[str, Callable[[Rows], bytes]] = {
    **PLAIN,
    **{f"{kind}.gz": lambda rows, write=write: gzip.compress(write(rows)) for kind, write in PLAIN.items()},
    **{f"{kind}.zst": lambda rows, write=write: zstd(write(rows)) for kind, write in PLAIN.items()},
    "parquet": parquet_file,
    "arrow": arrow_stream,
    "of_a_file.arrow": arrow_file,
}


def read(tmp_path: Path, content: bytes | str, filename: str) -> list[tuple[dict[str, int], Any]]:
    path = tmp_path / "upload"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(record.place, record.value) for record in read_records(path, filename)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_holds_the_same_rows(tmp_path: Path, container: str) -> None:
    rows = [{"a": "日本, \t 🎉", "b": 'says "x",\r\nthen\ny'}, {"a": " ", "b": ""}]
    found = read(tmp_path, CONTAINERS[container](rows), f"my.rows.{container.upper()}")
    assert [value for _, value in found] == rows


written = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@pass_through
@given(
    rows=st.lists(
        st.fixed_dictionaries({"instruction": written, "input": written, "output": written}), min_size=1, max_size=6
    ),
    container=st.sampled_from(list(CONTAINERS)),
)
def test_the_id_is_the_same_from_any_container(imported: Import, rows: Rows, container: str) -> None:
    rows = [*rows, *ALPACA]
    expected = imported(json_lines(rows), "rows.jsonl")
    report = imported(CONTAINERS[container](rows), f"rows.{container}")
    for figure in ("id", "rows_in", "kept", "dropped", "duplicates", "format"):
        assert report[figure] == expected[figure]


@pass_through
@given(
    content=st.binary(max_size=60) | st.text(max_size=60),
    container=st.sampled_from([*PLAIN, "parquet", "json.gz", "json.zst"]),
    wrap=st.booleans(),
)
def test_whatever_the_bytes_are_each_container_is_read_or_refused(
    imported: Import, content: bytes | str, container: str, wrap: bool
) -> None:
    body = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    packers: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd}
    pack = packers.get(container.rpartition(".")[2])
    try:
        imported(pack(body) if pack and wrap else body, f"a.{container}")
    except InvalidInput as error:
        assert error.next  # noqa: PT017  # most bytes are refused


@pass_through
@given(
    container=st.sampled_from(list(CONTAINERS)),
    cut=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    salvage=st.booleans(),
)
def test_a_damaged_or_truncated_file_is_read_or_refused(
    imported: Import, container: str, cut: float, value: int, salvage: bool
) -> None:
    whole = CONTAINERS[container](ALPACA)
    at = int(cut * len(whole))
    for content in (whole[:at], whole[:at] + bytes([value]) + whole[at + 1 :]):
        try:
            report = imported(content, f"a.{container}", salvage=salvage)
            assert report["rows_in"] == report["kept"] + report["dropped"] + report["duplicates"]
        except InvalidInput as error:
            assert error.next  # noqa: PT017  # most are refused


@pytest.mark.parametrize("container", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_no_truncated_file_passes_for_a_whole_one(tmp_path: Path, container: str) -> None:
    whole = CONTAINERS[container](ALPACA)
    for size in range(1, len(whole)):
        with pytest.raises(InvalidInput) as caught:
            read(tmp_path, whole[:size], f"a.{container}")
        assert caught.value.code == "damaged_file"


@pytest.mark.parametrize("filename", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, filename: str) -> None:
    with pytest.raises(InvalidInput, match=filename) as caught:
        read(tmp_path, json_lines(ALPACA), filename)
    assert caught.value.code == "damaged_file"


@pytest.mark.parametrize("filename", ["a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_missing_file_is_not_called_damaged(tmp_path: Path, filename: str) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        list(read_records(tmp_path / "none", filename))


def test_files_compressed_in_several_parts_are_read_to_the_end(tmp_path: Path) -> None:
    lines = json_lines(ALPACA).splitlines(keepends=True)
    for kind, compress in (("gz", gzip.compress), ("zst", zstd)):
        assert len(read(tmp_path, b"".join(map(compress, lines)), f"a.jsonl.{kind}")) == 3


def test_parquet_takes_no_compression_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not of a kind that can be read"):
        read(tmp_path, gzip.compress(parquet_file(ALPACA)), "a.parquet.gz")


def test_a_null_of_parquet_is_an_absent_key(tmp_path: Path) -> None:
    rows = [
        {"a": "x", "b": None, "list": [{"c": 1, "d": None}], "n": float("nan"), "raw": b"\xff", "text": b"\xc3\xa9"},
        {"a": None, "b": "y", "list": [{"c": None, "d": "z"}], "n": 1.5, "raw": b"", "text": None},
    ]
    assert read(tmp_path, parquet_file(rows), "a.parquet") == [
        ({"index": 0}, {"a": "x", "list": [{"c": 1}], "raw": {"bytes": 1}, "text": "é"}),
        ({"index": 1}, {"b": "y", "list": [{"d": "z"}], "n": 1.5, "raw": ""}),
    ]


def test_a_row_of_a_table_is_named_by_its_first_line(tmp_path: Path) -> None:
    content = '\ufeff\na,b\r\n"x\n\ny",1\n\nz,"2"\n'
    assert read(tmp_path, content, "a.csv") == [
        ({"line": 3}, {"a": "x\n\ny", "b": "1"}),
        ({"line": 7}, {"a": "z", "b": "2"}),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n1\n", "line 2: 1 cells under a header of 2"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells under a header of 2"),
        ("a,b,a\n1,2,3\n", "line 1: its header has the column 'a' more than once"),
        ('a,b\n1,2\n\n"x\ny,2\n', "line 4: unexpected end of data"),
        ('a,b\n"x"y,2\n', "line 2: ',' expected after '\"'"),
    ],
)
def test_a_malformed_table_is_named_by_its_line(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, content, "a.csv")
    assert caught.value.code == "malformed_table"
    assert says in caught.value.message


def test_a_quote_that_nothing_closes_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.data.readers._LONGEST_CELL", 1000)
    with pytest.raises(InvalidInput, match="line 2: field larger than field limit"):
        read(tmp_path, 'a\n"' + "x\n" * 10_000, "a.csv")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@pass_through
@given(
    rows=st.lists(json_values, min_size=1, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.none() | st.just(2),
    held=st.booleans(),
    ascii=st.booleans(),
)
def test_an_array_is_the_same_however_it_is_cut(
    tmp_path: Path, rows: list[Any], chunk: int, indent: int | None, held: bool, ascii: bool
) -> None:
    value = {"about": {"x": [1]}, "rows": rows, "n": 12.5} if held else rows
    content = json.dumps(value, indent=indent, ensure_ascii=ascii).encode(errors="surrogatepass")
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_CHUNK", chunk)
        assert read(tmp_path, content, "a.json") == [({"index": i}, row) for i, row in enumerate(rows)]


@pass_through
@given(
    content=st.lists(st.sampled_from([*'[]{},:"\\u12eE.-+ \né日a', "true", "null", "-Infinity", '"k":']), max_size=14),
    chunk=st.integers(1, 9),
)
def test_a_fault_is_the_same_however_the_file_is_cut(tmp_path: Path, content: list[str], chunk: int) -> None:
    outcomes = []
    for size in (chunk, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_module, "_CHUNK", size)
            try:
                outcomes.append(repr(read(tmp_path, "[1, " + "".join(content), "a.json")))
            except InvalidInput as error:
                outcomes.append(error.message)
    assert outcomes[0] == outcomes[1]


@pass_through
@given(content=st.text(st.sampled_from(list('[]{},:"\\u12eE.-+ \né日a')), max_size=14))
def test_a_fault_in_an_array_is_where_the_parser_of_whole_files_finds_it(tmp_path: Path, content: str) -> None:
    content = f"[{content}"
    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        with pytest.raises(InvalidInput) as caught:
            read(tmp_path, content, "a.json")
        byte = len(content[: error.pos].encode())
        place = f"line {error.lineno}, column {error.colno} (byte {byte}): {error.msg}"
        assert place in caught.value.message
    else:
        assert [value for _, value in read(tmp_path, content, "a.json")] == json.loads(content)


@pytest.mark.parametrize("chunk", range(1, 9))
def test_bytes_that_are_no_text_are_where_they_are_however_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(text_module, "_CHUNK", chunk)
    for filename in ("a.json", "a.jsonl", "a.csv"):
        for fault, shown in ((b"\xe6\x97x", "e6"), (b"\xff", "ff"), (b"\0", "00"), (b"\xe6", "e6")):
            with pytest.raises(InvalidInput, match=f"byte 8 is 0x{shown}"):
                read(tmp_path, '["日a'.encode() + b"bc" + fault, filename)


@pytest.mark.parametrize("container", ["jsonl", "json", "csv", "json.gz", "jsonl.zst"])
def test_memory_stays_flat(tmp_path: Path, container: str) -> None:
    numbers = random.Random(0)
    rows = [{"a": f"{numbers.random()} " * 50, "b": str(number)} for number in range(16_000)]
    content = CONTAINERS[container](rows)
    path = tmp_path / "upload"
    path.write_bytes(content)
    del rows, content
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path, f"a.{container}")) == 16_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12e6


def test_batches_longer_than_what_is_read_at_once_are_read_whole(tmp_path: Path) -> None:
    held, whole = io.BytesIO(), arrow.table({"n": range(2500)})
    with arrow.ipc.new_file(held, whole.schema) as into:
        into.write_table(whole)
    assert [row["n"] for _, row in read(tmp_path, held.getvalue(), "a.arrow")] == list(range(2500))


@pytest.mark.parametrize("before", [True, False])
def test_an_object_that_is_one_chat_is_a_row_whatever_arrays_it_has(tmp_path: Path, before: bool) -> None:
    beside: dict[str, object] = {"tools": [{"name": "f"}], "tags": []}
    after: dict[str, object] = {} if before else {"examples": [{"prompt": "q", "completion": "a"}]}
    row = {**(beside if before else {}), "messages": [{"role": "user", "content": "q"}], **after}
    row |= {} if before else beside
    assert [value for _, value in read(tmp_path, json.dumps(row).encode(), "a.json")] == [row]


def test_the_answer_of_a_viewer_has_rows_beside_its_features(tmp_path: Path) -> None:
    answer = {"features": [{"name": "prompt"}], "rows": [{"row": {"prompt": "q"}}], "num_rows_total": 1}
    assert [value for _, value in read(tmp_path, json.dumps(answer).encode(), "a.json")] == answer["rows"]


def test_a_chat_beside_rows_is_not_lost(tmp_path: Path) -> None:
    both = {"examples": [{"prompt": "q", "completion": "a"}], "messages": [{"role": "user", "content": "q"}]}
    with pytest.raises(InvalidInput, match="holds the arrays 'examples', 'messages'"):
        read(tmp_path, json.dumps(both).encode(), "a.json")
