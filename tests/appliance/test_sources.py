from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.errors import InvalidInput
from appliance.sources import SourceFile, find_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.csv", "sub/c.json.gz", "README.md", ".hidden.jsonl", ".git/d.jsonl", "sub/e.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_a_folder_gives_its_data_files_sorted(folder: Path) -> None:
    assert [file.name for file in find_sources([str(folder)])] == ["a.csv", "b.jsonl", "sub/c.json.gz", "sub/e.JSONL"]


def test_files_and_patterns_are_taken_in_order(folder: Path) -> None:
    found = find_sources([str(folder / "b.jsonl"), str(folder / "*.csv"), str(folder / "**" / "*.gz"), "-"])
    assert found == [
        SourceFile(folder / "b.jsonl", "b.jsonl"),
        SourceFile(folder / "a.csv", "a.csv"),
        SourceFile(folder / "sub" / "c.json.gz", "c.json.gz"),
        SourceFile(None, "stdin"),
    ]


def test_a_named_file_needs_no_known_extension(folder: Path) -> None:
    assert find_sources([str(folder / "README.md")]) == [SourceFile(folder / "README.md", "README.md")]
    assert find_sources(["-"], "csv") == [SourceFile(None, "stdin.csv")]


def test_a_file_whose_name_looks_like_a_pattern(folder: Path) -> None:
    (folder / "[1].jsonl").write_text("x")
    assert find_sources([str(folder / "[1].jsonl")])[0].path == folder / "[1].jsonl"


@pytest.mark.parametrize(
    ("given", "says"),
    [(["none.jsonl"], "does not exist"), (["*.none"], "does not exist"), (["empty"], "no data"), (["-", "-"], "once")],
)
def test_what_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], says: str) -> None:
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(InvalidInput, match=says):
        find_sources(given)


def test_a_pipe_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(InvalidInput, match="is no file"):
        find_sources([str(folder / "pipe.jsonl")])
    assert "pipe.jsonl" not in [file.name for file in find_sources([str(folder)])]
