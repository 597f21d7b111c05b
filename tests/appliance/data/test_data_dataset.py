from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from importing import Import

from appliance.data.dataset import HELD_OUT_AT_MOST, Dataset, prompt_group, split
from appliance.data.importer import import_files
from appliance.data.requests import ImportRequest, Source
from appliance.errors import NotFound
from appliance.home import Home


def question(number: int, answer: str) -> dict[str, str]:
    return {"instruction": f"question {number} 日本", "output": answer}


@pytest.fixture
def dataset(imported: Import, home: Home) -> Dataset:
    """100 prompts with three answers each, the answers of a prompt far apart."""
    rows = [question(number, answer) for answer in ("one", "two", "three") for number in range(100)]
    return Dataset.open(home, imported(rows)["id"])


def test_rows_are_found_by_number(dataset: Dataset) -> None:
    assert len(dataset.rows) == 300
    for index in (0, 1, 157, 299, -1):
        number = range(300)[index]
        assert dataset.rows[index]["messages"][0]["content"] == f"question {number % 100} 日本"
        assert dataset.rows[index]["source"]["line"] == number + 1
    assert dataset.rows[150:153] == [dataset.rows[150], dataset.rows[151], dataset.rows[152]]
    assert dataset.rows[298:400] == list(dataset.rows)[298:]
    for index in (300, -301):
        with pytest.raises(IndexError):
            dataset.rows[index]


@pytest.mark.parametrize("id", ["0" * 16, "../models", "", "abc"])
def test_an_unknown_id_is_not_found(home: Home, id: str) -> None:
    with pytest.raises(NotFound):
        Dataset.open(home, id)


@pytest.mark.parametrize(("share", "held_out"), [(0, 0), (0.001, 1), (0.1, 10), (0.5, 50), (1, 85)])
def test_a_share_of_the_prompts_is_held_out(dataset: Dataset, share: float, held_out: int) -> None:
    train, held = dataset.split(share)
    assert len(held) == 3 * held_out
    assert sorted(train + held) == list(range(300))
    assert train == sorted(train)
    asked = [{dataset.rows[index]["messages"][0]["content"] for index in side} for side in (train, held)]
    assert not asked[0] & asked[1]
    assert dataset.split(share) == (train, held)


def test_the_split_does_not_depend_on_order_or_answers(dataset: Dataset, imported: Import, home: Home) -> None:
    other = Dataset.open(home, imported([question(number, "four") for number in reversed(range(100))])["id"])

    def held_out(of: Dataset) -> set[str]:
        return {of.rows[index]["messages"][0]["content"] for index in of.split(0.1)[1]}

    assert held_out(other) == held_out(dataset)


HASHES = numpy.random.default_rng(7).permutation(1 << 20).astype("<u8")


def test_held_out_rows_come_by_their_groups_hash() -> None:
    """So that the first few of them are no more from the beginning of the file than the others."""
    groups = HASHES[:1000]
    train, held_out = split(groups, 0.1, numpy.zeros(1000, int))
    assert groups[held_out].tolist() == sorted(groups)[:100]
    assert train.tolist() == sorted(set(range(1000)) - set(held_out.tolist()))
    few = held_out[:20]
    assert min(few) < 200 < 800 < max(few)


def test_no_more_is_held_out_than_figures_need() -> None:
    train, held_out = split(HASHES[:100_000], 0.1, numpy.zeros(100_000, int))
    assert len(held_out) == HELD_OUT_AT_MOST
    assert len(train) == 100_000 - HELD_OUT_AT_MOST


@pytest.mark.parametrize("rows", [(700, 200, 100), (97, 800, 103)])
def test_each_file_gives_its_share_to_any_beginning_of_the_held_out_rows(rows: tuple[int, ...]) -> None:
    files = numpy.repeat(numpy.arange(len(rows)), rows)
    _, held_out = split(HASHES[:1000], 0.1, files)
    for count in (10, 30, 64, 100):
        found = numpy.bincount(files[held_out[:count]], minlength=len(rows))
        for number, of in zip(found, rows, strict=True):
            assert abs(number - count * of / 1000) <= 1.5


def test_a_small_file_gives_one_row_where_it_has_two() -> None:
    files = numpy.repeat(numpy.arange(4), (990, 4, 2, 1))
    groups = HASHES[: len(files)]
    _, held_out = split(groups, 0.1, files)
    assert numpy.bincount(files[held_out], minlength=4).tolist() == [98, 1, 1, 0]
    assert set(files[held_out[:64]]) == {0}, "which is too much of it for a few"
    _, two = split(groups, 0.002, files)
    assert len(two) == 2, "but only where there is room"


def test_groups_are_not_parted_whatever_their_files() -> None:
    dice = numpy.random.default_rng(2)
    groups, files = HASHES[dice.integers(0, 400, 1500)], numpy.repeat(numpy.arange(3), 500)
    train, held_out = split(groups, 0.1, files)
    assert not set(groups[train].tolist()) & set(groups[held_out].tolist())
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(1500))
    assert 140 < len(held_out) <= 150


def test_files_are_known_by_where_the_rows_came_from(home: Home, tmp_path: Path) -> None:
    counts = {"a.jsonl": 5, "b.jsonl": 1, "c.jsonl": 40, "d.jsonl": 2}
    sources = []
    for name, count in counts.items():
        path = tmp_path / name
        path.write_text("".join(json.dumps(question(number, name)) + "\n" for number in range(count)))
        sources.append(Source(path=path, filename=name))
    id = import_files(ImportRequest(files=sources, name="rows"), home)["id"]
    dataset = Dataset.open(home, id)
    assert dataset.rows.files().tolist() == [0] * 5 + [1] + [2] * 40 + [3] * 2
    _, held_out = dataset.split(0.25)
    assert {dataset.rows[row]["source"]["file"] for row in held_out} >= {"a.jsonl", "c.jsonl"}


def test_one_prompt_cannot_be_split(imported: Import, home: Home) -> None:
    report = imported([question(1, "one"), question(1, "two")])
    assert Dataset.open(home, report["id"]).split(0.5) == ([0, 1], [])


def test_two_prompts_are_split_one_and_one(imported: Import, home: Home) -> None:
    report = imported([{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in "xy"])
    assert sorted(map(len, Dataset.open(home, report["id"]).split(0.01))) == [1, 1]


def test_the_prompt_is_what_comes_before_the_last_answer() -> None:
    asked = {"role": "user", "content": "q"}
    answered = {"role": "assistant", "content": "a"}
    single = prompt_group({"messages": [asked, answered], "source": {"line": 1}})
    assert single == prompt_group({"messages": [asked, {**answered, "content": "b"}]})
    assert single == prompt_group({"prompt": [asked], "chosen": [answered], "rejected": [answered]})
    assert single == prompt_group({"messages": [dict(reversed(asked.items())), answered]})
    assert single != prompt_group({"messages": [asked, answered, asked, answered]})
