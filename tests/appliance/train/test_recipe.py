"""Recipes: what is read, and one clear line for what cannot be."""

from __future__ import annotations

import pytest

from appliance.api import ShippedRecipe
from appliance.errors import InvalidInput
from appliance.recipes import shipped_recipes
from appliance.train.recipe import dump_recipe, parse_recipe

GOOD = """
name = "facts"
base = "tiny"

[adapter]
kind = "lora"

[[stages]]
method = "sft"
dataset = "facts"
learning_rate = 1e-3

[[stages]]
method = "dpo"
dataset = "preferences"
"""


def test_stages_and_pipeline() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.pipeline() == ("sft", "dpo", "merge", "verify", "probe")
    assert recipe.previous("sft") is None
    assert recipe.previous("dpo") == "sft"
    assert recipe.stage("sft").learning_rate == 1e-3
    with pytest.raises(KeyError):
        recipe.stage("merge")


def test_a_dumped_recipe_reads_back_with_every_default_written_out() -> None:
    recipe = parse_recipe(GOOD)
    text = dump_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert "checkpoint_every = 20" in text


def test_a_recipe_without_stages_releases_the_base() -> None:
    assert parse_recipe('name = "base"\nbase = "tiny"').pipeline() == ("merge", "verify", "probe")


@pytest.mark.parametrize("shipped", shipped_recipes(), ids=lambda shipped: shipped.name)
def test_every_shipped_recipe_parses(shipped: ShippedRecipe) -> None:
    recipe = parse_recipe(shipped.text)
    assert recipe.name
    assert shipped.summary


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            GOOD.replace("learning_rate", "learing_rate"),
            "unknown key `stages[0].learing_rate` — did you mean `learning_rate`",
        ),
        (GOOD.replace("[adapter]", "[adaptor]"), "unknown key `adaptor` — did you mean `adapter`"),
        (GOOD + "zzz = 1", "unknown key `stages[1].zzz` — take it out"),
        (GOOD.replace('base = "tiny"', ""), "lacks `base`"),
        (GOOD.replace('dataset = "facts"', ""), "lacks `stages[0].dataset`"),
        (GOOD.replace('method = "sft"', 'method = "ppo"'), "no known method — set method to sft or dpo"),
        (GOOD.replace('method = "sft"', ""), "no known method"),
        (GOOD.replace("1e-3", "0"), "`stages[0].learning_rate` is not valid"),
        (GOOD.replace("1e-3", '"fast"'), "`stages[0].learning_rate` is not valid"),
        (GOOD.replace('"lora"', '"full"'), "`adapter.kind` is not valid"),
        (GOOD.replace("name = ", "name = = "), "is not TOML"),
        (GOOD.replace('name = "facts"', 'name = "../x"'), "`name` is not valid"),
        (GOOD.replace('method = "dpo"', 'method = "sft"'), "two stages have the same name"),
        (GOOD.replace('method = "dpo"', 'method = "dpo"\nname = "merge"'), "cannot be named 'merge'"),
        (GOOD + "batch_size = 8\nmicro_batch_size = 3", "micro_batch_size must divide batch_size"),
        ("", "lacks `name`"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(wrong: str, says: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_recipe(wrong)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
