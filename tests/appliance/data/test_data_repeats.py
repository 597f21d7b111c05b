from __future__ import annotations

import random
from typing import Any

import pytest
from importing import Import

from appliance.data.dataset import Dataset
from appliance.home import Home

WORDS = [f"word{number}" for number in range(400)]


def said(chance: random.Random, count: int) -> list[str]:
    return chance.choices(WORDS, k=count)


def asked(question: str, answer: str, system: str = "") -> dict[str, str]:
    return {"instruction": question, "output": answer, "system": system}


def finding(report: dict[str, Any], code: str) -> dict[str, Any]:
    return next((one for one in report["findings"] if one["code"] == code), {})


def groups(home: Home, report: dict[str, Any]) -> list[int]:
    found: list[int] = Dataset.open(home, report["id"]).index()["group"].tolist()
    return found


def test_near_duplicates_are_found_and_no_others(imported: Import, home: Home) -> None:
    chance = random.Random(3)
    texts = [said(chance, 60) for _ in range(200)]
    near = [[*text[:30], "changed", *text[31:]] for text in texts[:20]]
    far = [[*text[:48], *said(chance, 12)] for text in texts[20:40]]
    rows = [asked(f"q{number}", " ".join(text)) for number, text in enumerate(texts + near + far)]
    report = imported(rows)
    assert report["near_duplicates"] == 20
    assert finding(report, "near_duplicates")["rows"] == report["near"]
    pairs = {(one, other) for one, other, _ in report["near"]}
    assert pairs == {(f"line {number + 1}", f"line {number + 201}") for number in range(20)}
    assert all(0.8 <= share < 1 for _, _, share in report["near"])
    keys = groups(home, report)
    assert keys[:20] == keys[200:220]
    assert len(set(keys)) == 220


def test_near_duplicates_of_near_duplicates_are_one_group(imported: Import, home: Home) -> None:
    chance = random.Random(4)
    text = said(chance, 60)
    rows = []
    for step in range(10):
        text = [*text[: step * 3], f"new{step}", *text[step * 3 + 1 :]]
        rows.append(asked(f"q{step}", " ".join(text)))
    report = imported(rows)
    assert report["near_duplicates"] == 9
    assert len(set(groups(home, report))) == 1


def test_texts_without_spaces_are_compared_too(imported: Import) -> None:
    chance = random.Random(5)
    texts = ["".join(chr(chance.randrange(0x4E00, 0x9FA0)) for _ in range(120)) for _ in range(30)]
    near = [f"{text[:60]}變{text[61:]}" for text in texts[:5]]
    report = imported([asked(f"問{number}", text) for number, text in enumerate(texts + near)])
    assert report["near_duplicates"] == 5


@pytest.mark.parametrize(
    "others",
    [
        ["what is  the Capital of France", "WHAT IS THE CAPITAL OF FRANCE?!", "\uff37hat is the capital of France"],
        ["Quelle est la capitale de l\u2019\u00e9t\u00e9?", "quelle est la capitale de l'e\u0301te\u0301 ?"],
    ],
)
def test_wordings_of_a_prompt_are_one_group(imported: Import, home: Home, others: list[str]) -> None:
    first = "What is the capital of France?" if others[0].startswith("what") else others[0].upper()
    rows = [asked(prompt, f"answer {number}") for number, prompt in enumerate([first, *others, "Something else."])]
    keys = groups(home, imported(rows))
    assert len(set(keys[:-1])) == 1
    assert keys[-1] != keys[0]


def test_a_group_is_never_parted(imported: Import, home: Home) -> None:
    rows = [asked(f"Question {number}{mark}", f"{mark}{number}") for number in range(60) for mark in ("", "?", " !")]
    dataset = Dataset.open(home, imported(rows)["id"])
    train, held_out = dataset.split(0.1)
    keys = dataset.index()["group"]
    assert len(held_out) == 18
    assert not set(keys[train].tolist()) & set(keys[held_out].tolist())


def test_a_group_too_large_for_the_share_is_passed_over(imported: Import, home: Home) -> None:
    rows = [asked("the same", f"answer {number}") for number in range(80)] + [asked(f"q{n}", "a") for n in range(20)]
    dataset = Dataset.open(home, imported(rows)["id"])
    assert len(dataset.split(0.1)[1]) == 10
    assert all(index >= 80 for index in dataset.split(0.1)[1])


CONFLICTS: list[tuple[list[dict[str, Any]], int]] = [
    ([asked("q", "a"), asked("q", "b"), asked("q", "c"), asked("r", "a")], 1),
    ([asked("2+2?", "4"), asked("2-2?", "0"), asked("r", "a")], 0),
    ([asked("q", "a"), asked("q", "b", system="be brief")], 0),
    ([{**asked("q", "a"), "tools": [{"name": name}]} for name in "xy"], 0),
    ([{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "b", "rejected": "a"}], 2),
    ([{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "c"}], 0),
    ([{"prompt": "q", "completion": "a", "label": good} for good in (True, False)], 1),
    ([{"prompt": "q", "completion": "a", "label": True}, {"prompt": "r", "completion": "a", "label": False}], 0),
]


@pytest.mark.parametrize(("rows", "count"), CONFLICTS)
def test_conflicting_answers(imported: Import, rows: list[dict[str, Any]], count: int) -> None:
    report = imported(rows)
    assert report["conflicts"] == count
    assert bool(finding(report, "conflicting_answers")) == bool(count)
    if count:
        assert finding(report, "conflicting_answers")["rows"][0].startswith("line ")


def test_a_question_on_both_sides_of_the_split_is_said(imported: Import) -> None:
    rows = [asked("go on", f"answer {number}", system=f"persona {number}") for number in range(40)]
    report = imported(rows)
    assert report["questions_on_both_sides"] == 4
    assert finding(report, "question_on_both_sides")["count"] == 4
    assert imported([asked(f"q{number}", "a") for number in range(40)])["questions_on_both_sides"] == 0
