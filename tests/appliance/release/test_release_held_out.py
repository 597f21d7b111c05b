"""What a run's models are compared on."""

from __future__ import annotations

from pathlib import Path

from tiny import JUDGEMENTS, PREFERENCES, add_dataset, add_run, make_model, read_recipe, stage

from appliance.data.dataset import Dataset
from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.release.held_out import held_out_set, judged_on, last_stage_rows
from appliance.train.recipe import Given, Recipe, parse_recipe


def test_a_run_that_learnt_from_judgements_is_scored_on_the_good_answers(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    make_model(home.models / "tiny")
    recipe = read_recipe(add_run(home, "r", stage("kto", "JUDGEMENTS")))
    tokenizer = load_tokenizer(home.models / "tiny")
    rows = held_out_set(home, recipe, tokenizer)
    good = [[*row["prompt"], *row["completion"]] for row in JUDGEMENTS if row["label"]]
    assert rows.held_out
    assert rows.conversations
    assert all(row["messages"] in good for row in rows.conversations)

    answered = last_stage_rows(home, recipe, tokenizer)
    assert {row.sign for row in answered} == {1, -1}
    judged = {(row.conversation["messages"][-1]["content"], row.sign) for row in answered}
    assert judged <= {(row["completion"][0]["content"], 1 if row["label"] else -1) for row in JUDGEMENTS}


def test_without_data_plain_conversations_stand_in(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    make_model(home.models / "tiny")
    given = Recipe(name="r", base="tiny", given=Given(sha256="0"))
    tokenizer = load_tokenizer(home.models / "tiny")
    found = held_out_set(home, given, tokenizer)
    assert (len(found.conversations), found.held_out, found.plain) == (24, False, True)
    assert last_stage_rows(home, given, tokenizer) == []


def test_pairs_are_judged_by_both_answers_and_not_by_the_prompts_turns(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    make_model(home.models / "tiny")
    turns = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes?"}]
    rows = [{**row, "prompt": [*turns, *row["prompt"]]} for row in PREFERENCES]
    id = add_dataset(home, "pairs", rows)
    recipe = read_recipe(add_run(home, "r", stage("dpo", f'"{id}"')))
    answered = last_stage_rows(home, recipe, load_tokenizer(home.models / "tiny"))
    assert [row.sign for row in answered] == [1, -1] * (len(answered) // 2)
    first = answered[0].conversation["messages"]
    assert [turn.get("weight") for turn in first if turn["role"] == "assistant"] == [0, None]


def words(count: int) -> str:
    return " ".join(["word"] * count)


def many(home: Home, rows: int, length: int) -> Recipe:
    """A recipe over so many rows whose answers have about so many tokens."""
    home.create()
    make_model(home.models / "tiny")
    conversations = [
        {
            "messages": [
                {"role": "user", "content": f"Number {number}?"},
                {"role": "assistant", "content": f"{number} {words(length)}"},
            ]
        }
        for number in range(rows)
    ]
    id = add_dataset(home, "many", conversations)
    recipe = read_recipe(add_run(home, "r", stage("sft", f'"{id}"', max_length=1 << 14)))
    return recipe.model_copy(update={"eval_share": 0.5})


def test_rows_of_the_last_stage_are_those_that_were_trained_on_spread_over_all(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    recipe = many(home, 400, 2)
    dataset = Dataset.open(home, recipe.stages[0].dataset)
    train, _ = dataset.split(recipe.eval_share)
    found = last_stage_rows(home, recipe, load_tokenizer(home.models / "tiny"))
    asked = [row.conversation["messages"] for row in found]
    places = [
        next(place for place, index in enumerate(train) if dataset.rows[index]["messages"] == one) for one in asked
    ]
    assert len(places) == 32
    assert places[0] == 0
    assert places[-1] > 0.9 * len(train)
    assert places == sorted(places)


def test_a_held_out_set_has_as_many_rows_as_its_figures_need(tmp_path: Path) -> None:
    for name, length, rows in (("short", 2, range(150, 201)), ("long", 1000, range(64, 65))):
        home = Home(tmp_path / name)
        recipe = many(home, 400, length)
        assert len(held_out_set(home, recipe, load_tokenizer(home.models / "tiny")).conversations) in rows


def test_a_run_is_judged_on_what_its_last_stage_goes_back_to() -> None:
    stages = [("other", "sft", "others", "base"), ("sft", "sft", "facts", "base"), ("dpo", "dpo", "pairs", "sft")]
    text = 'name = "a"\nbase = "b"\n' + "".join(
        f'[[stages]]\nname = "{name}"\nmethod = "{method}"\ndataset = "{dataset}"\nfrom = "{origin}"\n'
        for name, method, dataset, origin in stages
    )
    assert judged_on(parse_recipe(text)) == ("facts", 1024)
    assert judged_on(parse_recipe(text.replace('from = "sft"', 'from = "other"'))) == ("others", 1024)
