"""Every shipped recipe is run, for a few steps on a tiny model; and the page about recipes says what they take."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from tiny import FACTS, JUDGEMENTS, PREFERENCES, add_dataset, losses, read_recipe, work

from appliance.api import ShippedRecipe
from appliance.home import Home
from appliance.recipes import shipped_recipes
from appliance.train.recipe import Recipe, dump_recipe
from appliance.train.reference import recipe_reference

ROWS = {"sft": FACTS, "dpo": PREFERENCES, "kto": JUDGEMENTS}
PAGE = Path(__file__).parents[3] / "docs" / "RECIPES.md"


@pytest.mark.parametrize("shipped", shipped_recipes(), ids=lambda shipped: shipped.name)
def test_a_shipped_recipe_trains(home: Home, shipped: ShippedRecipe) -> None:
    values = tomllib.loads(shipped.text)
    for stage in values.get("stages", []):
        stage |= {"dataset": add_dataset(home, stage["method"], ROWS[stage["method"]]), "epochs": 3, "max_steps": 2}
    run = home.runs / "r"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(Recipe.model_validate({**values, "base": "tiny", "eval_share": 0.2})))
    for stage in read_recipe(run).stages:
        assert work(run, stage.name) == 0
        assert list(losses(run, stage.name)) == [1, 2]
        assert (run / stage.name / "adapter" / "adapter_model.safetensors").exists()


def test_the_page_about_recipes_is_that_of_the_declarations() -> None:
    assert PAGE.read_text() == recipe_reference(), "stale: run `make docs`"
