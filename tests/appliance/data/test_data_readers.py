from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.data.readers import read_records
from appliance.errors import InvalidInput


def read(tmp_path: Path, content: bytes | str, filename: str) -> list[tuple[dict[str, int], Any]]:
    path = tmp_path / "upload"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(record.place, record.value) for record in read_records(path, filename)]


@pytest.mark.parametrize("filename", ["a.jsonl", "a.ndjson", "A.JSONL"])
def test_json_lines_are_counted_with_their_blank_lines(tmp_path: Path, filename: str) -> None:
    assert read(tmp_path, '{"a": 1}\r\n\n[2]\n', filename) == [({"line": 1}, {"a": 1}), ({"line": 3}, [2])]


@pytest.mark.parametrize("content", ["[1, 2]", '{"about": "x", "rows": [1, 2]}'])
def test_an_array_alone_or_in_an_object(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content, "a.json") == [({"index": 0}, 1), ({"index": 1}, 2)]


@pytest.mark.parametrize("content", ['{"a": [], "b": []}', '{"a": 1}', "3", '"text"'])
def test_json_without_one_list_of_rows_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, content, "a.json")
    assert caught.value.code == "no_list_of_rows"


@pytest.mark.parametrize("filename", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, filename: str) -> None:
    assert [value for _, value in read(tmp_path, b"\xef\xbb\xbf[1]", filename)] in ([1], [[1]])


@pytest.mark.parametrize("filename", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path: Path, filename: str, mark: bytes) -> None:
    content = mark + '[1]\n["é'.encode() + b'\xe9"]'
    with pytest.raises(InvalidInput, match=f"byte {len(mark) + 8} is 0xe9"):
        read(tmp_path, content, filename)


@pytest.mark.parametrize("filename", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, filename: str, encoding: str) -> None:
    content = '\ufeff["日本 🎉"]\n'.encode(encoding)
    assert [value for _, value in read(tmp_path, content, filename)] in (["日本 🎉"], [["日本 🎉"]])


def test_faults_of_utf16_are_named_by_its_bytes(tmp_path: Path) -> None:
    content = '\ufeff["é"]\n["🎉" 1]'.encode("utf-16-le")
    with pytest.raises(InvalidInput, match=r"line 2, column 6 \(byte 26\)"):
        read(tmp_path, content, "a.jsonl")
    assert content[26:28].decode("utf-16-le") == "1"
    with pytest.raises(InvalidInput, match="is not UTF-16: byte 4 is 0x00"):
        read(tmp_path, content[:4] + b"\x00\xdc", "a.json")


@pytest.mark.parametrize("filename", ["a.json", "a.jsonl", "a.csv"])
def test_utf16_without_its_mark_is_refused_with_the_way_out(tmp_path: Path, filename: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not UTF-8: byte 1 is 0x00.*iconv"):
        read(tmp_path, "[1]".encode("utf-16-le"), filename)


def test_a_malformed_line_is_named_by_line_column_and_byte(tmp_path: Path) -> None:
    content = '{"é": "日本"}\n\n{"a" 1}\n'
    with pytest.raises(InvalidInput, match=r"line 3, column 6 \(byte 23\)") as caught:
        read(tmp_path, content, "a.jsonl")
    assert caught.value.code == "malformed_json"
    assert content.encode()[23:24] == b"1"


def test_a_malformed_array_is_named_by_line_column_and_byte(tmp_path: Path) -> None:
    content = '[\n {"é": 1},\n {"a" 2}\n]'
    with pytest.raises(InvalidInput, match=r"line 3, column 7 \(byte 20\)"):
        read(tmp_path, content, "a.json")
    assert content.encode()[20:21] == b"2"


def test_json_lines_named_json_are_told_to_be_renamed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"name it \.jsonl"):
        read(tmp_path, '{"a": 1}\n{"a": 2}\n', "a.json")


@pytest.mark.parametrize("content", ["[" * 100_000, "[" + "1" * 5000 + "]"])
@pytest.mark.parametrize("filename", ["a.json", "a.jsonl"])
def test_what_the_parser_cannot_hold_is_malformed_not_a_crash(tmp_path: Path, content: str, filename: str) -> None:
    with pytest.raises(InvalidInput, match="malformed at line 1"):
        read(tmp_path, content, filename)


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    assert read(tmp_path, "[NaN, -Infinity]", "a.json") == [({"index": 0}, None), ({"index": 1}, None)]


def test_an_unknown_extension_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"a\.xlsx is not of a kind.*\.csv"):
        read(tmp_path, "", "a.xlsx")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read a\.json: No such file"):
        list(read_records(tmp_path / "none", "a.json"))
