from __future__ import annotations

import gzip
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import Import
from test_data_containers import zstd
from test_data_importer import ALPACA, pass_through

from appliance.errors import InvalidInput

LINES = [json.dumps(row).encode() + b"\n" for row in ALPACA]
ARRAY = json.dumps(ALPACA, indent=1).encode()
NESTED = json.dumps(
    [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": n}]} for n in "abc"]
)


def kept(report: dict[str, Any]) -> list[str]:
    assert report["rows_in"] == report["kept"] + report["dropped"] + report["duplicates"]
    return [drop["reason"] for drop in report["drops"] if drop["code"] == "damaged"]


@pytest.mark.parametrize(
    ("content", "filename", "whole", "place", "lost"),
    [
        (LINES[0] + b'{"instru\n' + LINES[2], "a.jsonl", 2, {"line": 2, "byte": len(LINES[0])}, "9 bytes"),
        (LINES[0] + b'{"a": "\xff"}\n' + LINES[2], "a.jsonl", 2, {"line": 2, "byte": len(LINES[0])}, "11 bytes"),
        (LINES[0] + LINES[1][:20], "a.jsonl", 1, {"line": 2, "byte": len(LINES[0])}, "20 bytes"),
        (ARRAY.replace(b'"question 1"', b'"question 1'), "a.json", 2, {"index": 1}, "75 bytes"),
        (ARRAY.replace(b"},", b"} x", 1), "a.json", 3, {"index": 1}, "3 bytes"),
        (ARRAY[:-30], "a.json", 2, {"index": 2}, "all after it"),
        (ARRAY.replace(b"question 1", b"question \xff"), "a.json", 1, {"index": 1}, "all after it"),
        (NESTED.replace('"content": "b"', '"content" "b"'), "a.json", 2, {"index": 1}, "bytes"),
        (b"instruction,output\nq,a\nq,b,c\nq,d\n", "a.csv", 2, {"line": 3}, "6 bytes"),
        (b'instruction,output\nq,a\n\xff,b\nq,"d', "a.csv", 1, {"line": 3}, "4 bytes"),
    ],
)
def test_what_is_whole_is_kept_and_what_was_lost_is_said(
    imported: Import, content: Any, filename: str, whole: int, place: dict[str, int], lost: str
) -> None:
    with pytest.raises(InvalidInput, match=r"with --salvage"):
        imported(content, filename)
    report = imported(content, filename, salvage=True)
    assert report["kept"] == whole
    first = report["drops"][0]
    assert first["code"] == "damaged"
    assert re.search(f"{lost} (was|were) lost$", first["reason"])
    assert place.items() <= first.items()
    assert report["findings"][-1]["code"] == "salvaged"


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_cut_off_archive_gives_what_came_before(imported: Import, pack: Any) -> None:
    rows = [{"instruction": f"question {n}", "output": f"{n * 7919}" * 50} for n in range(4000)]
    packed = pack("".join(json.dumps(row) + "\n" for row in rows).encode())
    with pytest.raises(InvalidInput, match="damaged or cut off"):
        imported(packed[: len(packed) // 2], "a.jsonl" + (".gz" if pack is gzip.compress else ".zst"))
    report = imported(
        packed[: len(packed) // 2], "a.jsonl" + (".gz" if pack is gzip.compress else ".zst"), salvage=True
    )
    assert 1000 < report["kept"] < 3000
    assert report["drops"] == [{"line": report["kept"] + 1, "code": "damaged", "reason": report["drops"][0]["reason"]}]


@pass_through
@given(cut=st.integers(1, sum(map(len, LINES)) - 1))
def test_cut_anywhere_json_lines_lose_one_record(imported: Import, cut: int) -> None:
    content = b"".join(LINES)[:cut]
    before = content.count(b"\n") + (content + b"\n" in (LINES[0], LINES[0] + LINES[1], b"".join(LINES)))
    try:
        report = imported(content, "a.jsonl", salvage=True)
    except InvalidInput:
        assert before == 0
    else:
        assert report["kept"] == before
        assert len(kept(report)) == report["rows_in"] - before


@pass_through
@given(at=st.integers(0, len(ARRAY) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_any_fault_in_an_array_loses_no_row_before_it(imported: Import, at: int, byte: int, cut: bool) -> None:
    damaged = ARRAY[:at] if cut else ARRAY[:at] + bytes([byte]) + ARRAY[at + 1 :]
    before = ARRAY[:at].count(b"}")
    try:
        report = imported(damaged, "a.json", salvage=True)
    except InvalidInput as error:
        assert before == 0
        assert error.next  # noqa: PT017  # what has no whole row makes no dataset
    else:
        assert report["kept"] >= before
        kept(report)


def test_a_missing_comma_loses_nothing(imported: Import) -> None:
    report = imported(ARRAY.replace(b"},", b"}", 1), "a.json", salvage=True)
    assert (report["rows_in"], report["kept"], report["findings"]) == (3, 3, [])
