"""Recipes: what is read, and one clear line for what cannot be."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from appliance.api import ShippedRecipe
from appliance.errors import InvalidInput
from appliance.recipes import shipped_recipes
from appliance.train.recipe import Start, dump_recipe, parse_recipe

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
    assert recipe.parent("sft") is None
    assert recipe.parent("dpo") == "sft"
    assert recipe.stage("sft").learning_rate == 1e-3
    with pytest.raises(KeyError):
        recipe.stage("merge")


GRAPH = """
name = "facts"
base = "tiny"
[[stages]]
method = "sft"
dataset = "facts"
[[stages]]
name = "other"
from = "base"
method = "sft"
dataset = "others"
[[stages]]
from = "sft"
method = "dpo"
dataset = "preferences"
"""


LEADS_NOWHERE = """name = "a"
base = "b"
start = "r"
[[stages]]
method = "sft"
dataset = "d"
from = "base"
"""


def test_stages_go_on_with_whichever_they_name(tmp_path: Path) -> None:
    recipe = parse_recipe(GRAPH)
    assert [recipe.parent(name) for name in ("sft", "other", "dpo")] == [None, None, "sft"]
    assert [stage.name for stage in recipe.chain()] == ["sft", "dpo"]
    assert [stage.name for stage in recipe.chain("other")] == ["other"]
    assert recipe.starting_adapter(tmp_path, "dpo") == tmp_path / "sft" / "adapter"
    assert recipe.starting_adapter(tmp_path, "other") is None
    assert recipe.datasets == {"sft": "facts", "dpo": "preferences"}, "what is in the release"
    assert not recipe.only_nudges
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert 'from = "sft"' in dump_recipe(recipe)


def test_a_run_that_starts_from_a_release_goes_on_with_its_adapter(tmp_path: Path) -> None:
    recipe = parse_recipe('start = "facts-1"\n' + GRAPH)
    assert recipe.start == Start(release="facts-1")
    assert recipe.starting_adapter(tmp_path, "sft") == tmp_path / "start"
    assert recipe.starting_adapter(tmp_path, "other") is None, "it is from the base"
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("start", "origin", "nudges"),
    [("", "", True), ("{release = 'r', nudges = true}", "", True), ("'r'", "", False)],
)
def test_what_only_nudges_depends_on_what_it_goes_on_with(start: str, origin: str, nudges: bool) -> None:
    head = f"start = {start}\n" if start else ""
    text = f'{head}name = "a"\nbase = "b"\n[[stages]]\nmethod = "dpo"\ndataset = "d"\nfrom = "{origin}"'
    assert parse_recipe(text).only_nudges is nudges


def test_a_run_can_end_in_its_adapter() -> None:
    assert parse_recipe('end = "adapter"\n' + GRAPH).pipeline() == ("sft", "other", "dpo")


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('from = "sft"', 'from = "dpo"', "stage 'dpo' is from 'dpo', and no stage before it has that name"),
        ('from = "sft"', 'from = "merge"', "is from 'merge', and no stage before it"),
        ('name = "other"', 'name = "base"', "cannot be named 'base'"),
        ('name = "other"', 'name = "start"', "cannot be named 'start'"),
        ('base = "tiny"', 'base = "tiny"\nend = "adapter"\npromote = true', "makes no release to promote"),
        (GRAPH, 'name = "a"\nbase = "b"\nstart = "r"', "there is nothing to start"),
        (GRAPH, 'name = "a"\nbase = "b"\nend = "adapter"', "nothing to start or to end"),
        (GRAPH, LEADS_NOWHERE, "does not go back to what `start` names"),
        ('from = "sft"', 'loss_type = "ipo"\nlabel_smoothing = 0.1', "^the recipe is not valid: label_smoothing is of"),
        ('from = "sft"', "adam_betas = [0.9]", "`stages.2..adam_betas` has too few items"),
    ],
)
def test_a_graph_that_cannot_be_is_refused(before: str, after: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        parse_recipe(GRAPH.replace(before, after))


def test_a_dumped_recipe_reads_back_with_every_default_written_out() -> None:
    recipe = parse_recipe(GOOD)
    text = dump_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert "bad_steps = 3" in text


def test_a_recipe_has_the_day_on_which_it_was_first_read_or_its_own() -> None:
    before = date.today()
    recipe = parse_recipe(GOOD)
    assert before <= recipe.clock <= date.today()
    assert f'clock = "{recipe.clock}"' in dump_recipe(recipe)
    for day in ("2024-02-29", '"2024-02-29"'):
        earlier = parse_recipe(f"clock = {day}" + GOOD)
        assert earlier.clock == date(2024, 2, 29)
        assert parse_recipe(dump_recipe(earlier)) == earlier


@pytest.mark.parametrize(
    ("parameters", "sft", "dpo"),
    [(1.35e8, 1e-3, 2.5e-5), (1.5e9, 5e-4, 1.25e-5), (8e9, 2e-4, 5e-6), (7e10, 1e-4, 2.5e-6)],
)
def test_learning_rates_follow_the_size_of_the_base(parameters: float, sft: float, dpo: float) -> None:
    recipe = parse_recipe(GOOD.replace("learning_rate = 1e-3\n", "")).for_base(int(parameters))
    assert recipe.stage("sft").learning_rate == sft
    assert recipe.stage("dpo").learning_rate == pytest.approx(dpo)
    assert parse_recipe(GOOD).for_base(int(parameters)).stage("sft").learning_rate == 1e-3


@pytest.mark.parametrize(
    ("adapter", "alpha"),
    [
        ('kind = "lora"', 32),
        ('kind = "lora"\nrank = 64', 128),
        ('kind = "rslora"', 8),
        ('kind = "rslora"\nrank = 64', 16),
        ('kind = "dora"\nalpha = 5', 5),
    ],
)
def test_an_adapter_is_scaled_by_two_at_any_rank(adapter: str, alpha: int) -> None:
    assert parse_recipe(GOOD.replace('kind = "lora"', adapter)).adapter.alpha == alpha


def test_what_is_not_taught_answers_is_only_nudged() -> None:
    sft = GOOD[GOOD.index("[[stages]]") : GOOD.rindex("[[stages]]")]
    assert parse_recipe(GOOD.replace(sft, "")).only_nudges
    assert not parse_recipe('name = "r"\nbase = "tiny"\n[given]\nsha256 = "0"').only_nudges, "nobody knows"
    assert not parse_recipe(GOOD).only_nudges
    assert not parse_recipe('name = "r"\nbase = "tiny"').only_nudges


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
        (GOOD.replace("learning_rate", "sft_weight"), "`stages[0].sft_weight` is a key of dpo stages — take it out"),
        ("epochs = 2" + GOOD, "`epochs` is a key of sft and dpo and kto stages — move it below a [[stages]]"),
        (
            GOOD.replace('"lora"', '"lora"\nlayers = [true]'),
            "`adapter.layers[0]` is True, and has to be a whole",
        ),
        (GOOD + "zzz = 1", "unknown key `stages[1].zzz` — take it out"),
        (GOOD.replace('base = "tiny"', ""), "lacks `base`"),
        (GOOD.replace('dataset = "facts"', ""), "lacks `stages[0].dataset`"),
        (GOOD.replace('method = "sft"', 'method = "ppo"'), "no known method — set method to one of sft, dpo, kto"),
        (GOOD.replace('method = "sft"', ""), "no known method"),
        (GOOD.replace("1e-3", "-1"), "`stages[0].learning_rate` is -1, and has to be 0 or more"),
        (GOOD.replace("1e-3", '"fast"'), "`stages[0].learning_rate` is 'fast', and has to be a number"),
        (
            GOOD.replace('"lora"', '"full"'),
            "`adapter.kind` is 'full', and has to be 'lora', 'qlora', 'rslora' or 'dora'",
        ),
        (GOOD.replace("name = ", "name = = "), "is not TOML"),
        (
            GOOD.replace('name = "facts"', 'name = "../x"'),
            "`name` is '../x', and has to be a name of letters, digits, dots and dashes",
        ),
        (GOOD.replace('method = "dpo"', 'method = "sft"'), "two stages have the same name"),
        (GOOD.replace('method = "dpo"', 'method = "dpo"\nname = "merge"'), "cannot be named 'merge'"),
        ('clock = "yesterday"' + GOOD, "`clock` is 'yesterday', and has to be a day, such as 2026-01-31"),
        (
            GOOD.replace('base = "tiny"', 'base = "org/Tiny-1B"'),
            "of a model that is here — `appliance pull org/Tiny-1B`",
        ),
        (GOOD.replace('"lora"', '"lora"\ntargets = "all-linear"'), 'a list, such as `targets = ["all-linear"]`'),
        (GOOD.replace('"lora"', '"lora"\nrank = 1.5'), "`adapter.rank` is 1.5, and has to be a whole number"),
        ("seed = 0.5" + GOOD, "`seed` is 0.5, and has to be a whole number"),
        ('promote = "maybe"' + GOOD, "`promote` is 'maybe', and has to be true or false"),
        ("stages = 3", "lacks `name`"),
        ("", "lacks `name`"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(wrong: str, says: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_recipe(wrong)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "should" not in str(raised.value), "pydantic's words"
