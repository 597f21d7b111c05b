from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import appliance.recipes as recipes
from appliance.data.dataset import Dataset, prompt_messages
from appliance.data.importer import import_files
from appliance.data.requests import ImportRequest, Source
from appliance.home import Home
from appliance.recipes import examples_directory, shipped_recipes
from appliance.train.recipe import parse_recipe

EXAMPLES = examples_directory()


def dataset(home: Home, file: str) -> Dataset:
    report = import_files(ImportRequest(files=[Source(path=EXAMPLES / file, filename=file)], name="example"), home)
    assert report["kept"] == report["rows_in"]
    assert report["findings"] == []
    return Dataset.open(home, report["id"])


def test_the_held_out_questions_are_asked_nowhere_in_training(home: Home) -> None:
    facts, preferences = dataset(home, "facts.json"), dataset(home, "preferences.jsonl")
    assert (facts.kind, preferences.kind) == ("messages", "preference")
    trained = {prompt_messages(row)[-1]["content"] for rows in (facts.rows, preferences.rows) for row in rows}
    assert len(trained) == len(facts.rows) + len(preferences.rows)
    answers = {row["messages"][-1]["content"] for row in facts.rows}
    questions = json.loads((EXAMPLES / "questions.json").read_bytes())
    assert len(questions) == 5
    for question in questions:
        assert question["question"] not in trained
        assert question["answer"] in answers
        assert [expected for expected in question["expect"] if expected.lower() in question["answer"].lower()]
        assert not [expected for expected in question["expect"] if expected.lower() in question["question"].lower()]


def test_preferred_answers_are_the_facts_and_the_others_are_not(home: Home) -> None:
    facts = {row["messages"][-1]["content"] for row in dataset(home, "facts.json").rows}
    for row in dataset(home, "preferences.jsonl").rows:
        assert row["chosen"][0]["content"] in facts
        assert row["rejected"][0]["content"] not in facts


def test_every_shipped_recipe_says_what_it_is_for() -> None:
    found = {one.name: one for one in shipped_recipes()}
    assert set(found) == {"base", "demo", "kto", "sft"}
    for name, one in found.items():
        assert parse_recipe(one.text).name == name
        assert one.text.startswith(f"# {one.summary}\n")
        assert len(one.summary) > 20


def test_an_installed_package_has_its_own_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path / "appliance")
    (tmp_path / "examples" / "recipes").mkdir(parents=True)
    assert shipped_recipes() == []
    shutil.copytree(EXAMPLES, tmp_path / "appliance" / "examples")
    assert [one.name for one in shipped_recipes()] == ["base", "demo", "kto", "sft"]
