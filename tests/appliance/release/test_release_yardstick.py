"""What a run's models are scored on."""

from __future__ import annotations

from pathlib import Path

from tiny import JUDGEMENTS, add_run, make_model, read_recipe, stage

from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.release.held_out import yardstick


def test_a_run_that_learnt_from_judgements_is_scored_on_the_good_answers(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    make_model(home.models / "tiny")
    recipe = read_recipe(add_run(home, "r", stage("kto", "JUDGEMENTS")))
    rows = yardstick(home, recipe, load_tokenizer(home.models / "tiny"))
    good = [[*row["prompt"], *row["completion"]] for row in JUDGEMENTS if row["label"]]
    assert rows.held_out
    assert rows.conversations
    assert all(row["messages"] in good for row in rows.conversations)
