from __future__ import annotations

import json
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
        SourceFile(folder / "sub" / "c.json.gz", "sub/c.json.gz"),
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


def test_what_a_dataset_info_beside_a_file_says_of_it_comes_with_it(folder: Path) -> None:
    entry = {"file_name": "b.jsonl", "columns": {"prompt": "ask"}}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "remote": {"hf_hub_url": "org/data"}}))
    found = {file.name: file.about for file in find_sources([str(folder)])}
    assert found == {"a.csv": {}, "b.jsonl": entry, "sub/c.json.gz": {}, "sub/e.JSONL": {}}
    assert find_sources([str(folder / "b.jsonl")])[0].about == entry
    (folder / "dataset_info.json").write_text("[1]")
    assert find_sources([str(folder / "b.jsonl")])[0].about == {}


def test_a_folder_of_save_to_disk_gives_its_arrow_files(folder: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "cache-1f.arrow", "state.json", "dataset_info.json"):
        (folder / "sub" / name).write_text("{}")
    names = [file.name for file in find_sources([str(folder / "sub")])]
    assert names == ["c.json.gz", "data-00000-of-00001.arrow", "e.JSONL"]


def test_folders_that_a_pattern_goes_through_stand_in_the_names_of_its_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "x.jsonl").write_text("x")
    found = find_sources([str(tmp_path / "data" / "*" / "*.jsonl")])
    assert [file.name for file in found] == ["test/x.jsonl", "train/x.jsonl"]
    assert [file.name for file in find_sources([str(tmp_path / "data" / "test" / "?.jsonl")])] == ["x.jsonl"]
