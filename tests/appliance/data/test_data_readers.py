from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from appliance.data.encoding import require_known
from appliance.data.readers import Record, read_records
from appliance.errors import InvalidInput


def read(
    tmp_path: Path, content: bytes | str, filename: str, encoding: str = "utf-8"
) -> list[tuple[dict[str, int], Any]]:
    path = tmp_path / "upload"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    records = list(read_records(path, filename, encoding=encoding))
    assert all(isinstance(record, Record) for record in records)
    return [(record.place, record.value) for record in records if isinstance(record, Record)]


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


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_table_may_have_other_delimiters_than_its_name_says(tmp_path: Path, mark: str) -> None:
    content = f'instruction{mark}output\nhello, you{mark}"a{mark}b"\n'
    assert read(tmp_path, content, "a.csv") == [({"line": 2}, {"instruction": "hello, you", "output": f"a{mark}b"})]
    assert read(tmp_path, "text\na;b\n", "a.csv") == [({"line": 2}, {"text": "a;b"})]


@pytest.mark.parametrize(
    ("filename", "content"), [("a.csv", "a,b\r1,2\r3,4\r"), ("a.jsonl", '{"a": "1", "b": "2"}\r{"a": "3", "b": "4"}')]
)
def test_old_line_ends_are_read(tmp_path: Path, filename: str, content: str) -> None:
    assert [value for _, value in read(tmp_path, content, filename)] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_mark_in_the_middle_of_files_that_were_put_together_is_no_content(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n'
    assert [value for _, value in read(tmp_path, content, "a.jsonl")] == [{"a": 1}, {"a": 2}]


def test_a_pointer_to_a_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    content = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    with pytest.raises(InvalidInput, match="is a Git LFS pointer") as caught:
        read(tmp_path, content, "a.jsonl")
    assert "git lfs pull" in caught.value.next


TEXTS = {
    "cp1252": "I don\u2019t know \u2013 it\u2019s na\u00efve, and \u201cquoted\u201d",
    "gb18030": "\u4f60\u597d\u5417\uff0c\u6211\u5f88\u597d\u3002\u4eca\u5929\u5929\u6c14\u4e0d\u9519",
    "cp932": "\u3053\u3093\u306b\u3061\u306f\u3001\u5143\u6c17\u3067\u3059\u3002\u3042\u308a\u304c\u3068\u3046",
    "cp1251": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430? "
    "\u0425\u043e\u0440\u043e\u0448\u043e, \u0441\u043f\u0430\u0441\u0438\u0431\u043e",
    "utf_16_le": "hello there",
}


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("filename", ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_another_encoding_is_guessed_and_read_where_it_is_named(tmp_path: Path, filename: str, encoding: str) -> None:
    rows = json.dumps([{"text": TEXTS[encoding]}], ensure_ascii=False)
    written = f'text\n"{TEXTS[encoding]}"\n' if filename == "a.csv" else rows if filename == "a.json" else rows[1:-1]
    content = written.encode(encoding)
    content = gzip.compress(content) if filename.endswith(".gz") else content
    with pytest.raises(InvalidInput, match=rf"is not UTF-8: byte .*; read as {encoding} '") as caught:
        read(tmp_path, content, filename)
    assert caught.value.next.startswith(f"say which it is (--encoding {encoding}), or save it as UTF-8")
    assert [value for _, value in read(tmp_path, content, filename, encoding)] == [{"text": TEXTS[encoding]}]


def test_a_fault_far_into_a_file_is_shown_with_what_is_around_it(tmp_path: Path) -> None:
    content = b'{"a": 1}\n' * 300_000 + '{"a": "caf\u00e9 cr\u00e8me"}\n'.encode("cp1252")
    with pytest.raises(InvalidInput, match=r"byte 2700010 is 0xe9; read as cp1252 '.*\"caf\u00e9 cr\u00e8me"):
        read(tmp_path, content, "a.jsonl")


def test_an_encoding_that_does_not_exist_is_refused() -> None:
    for name in ("klingon", "base64", "rot13"):
        with pytest.raises(InvalidInput, match=f"there is no encoding '{name}'"):
            require_known(name)


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


@pytest.mark.parametrize("mark", [",", ";", "|"])
def test_the_line_of_excel_before_the_header_says_the_delimiter(tmp_path: Path, mark: str) -> None:
    content = f"sep={mark}\n q {mark}a{mark}\nx{mark}y{mark}z\n"
    assert read(tmp_path, content, "a.csv") == [({"line": 3}, {"q": "x", "a": "y", "column 3": "z"})]
