from __future__ import annotations

import pytest
from importing import Import

from appliance.data.dataset import Dataset, prompt_group
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


@pytest.mark.parametrize(("share", "held_out"), [(0, 0), (0.001, 1), (0.1, 10), (0.5, 50), (1, 99)])
def test_a_share_of_the_prompts_is_held_out(dataset: Dataset, share: float, held_out: int) -> None:
    train, held = dataset.split(share)
    assert len(held) == 3 * held_out
    assert sorted(train + held) == list(range(300))
    assert train == sorted(train)
    assert held == sorted(held)
    asked = [{dataset.rows[index]["messages"][0]["content"] for index in side} for side in (train, held)]
    assert not asked[0] & asked[1]
    assert dataset.split(share) == (train, held)


def test_the_split_does_not_depend_on_order_or_answers(dataset: Dataset, imported: Import, home: Home) -> None:
    other = Dataset.open(home, imported([question(number, "four") for number in reversed(range(100))])["id"])

    def held_out(of: Dataset) -> set[str]:
        return {of.rows[index]["messages"][0]["content"] for index in of.split(0.1)[1]}

    assert held_out(other) == held_out(dataset)


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
