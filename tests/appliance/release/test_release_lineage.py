"""A run that starts from a release takes over its adapter, with that adapter's settings."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import Conflict, InvalidInput, NotFound
from appliance.home import Home, hashes, sha256
from appliance.release.lineage import copy_start, going_on
from appliance.train.recipe import Recipe, Start, parse_recipe

RECIPE = 'name = "more"\nbase = "b"\nstart = "r-1"\n[[stages]]\nmethod = "dpo"\ndataset = "d"\n'
MADE_BY = 'name = "r"\nbase = "b"\n[adapter]\nkind = "dora"\nrank = 3\n[[stages]]\nmethod = "sft"\ndataset = "d"\n'


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with the base `b` and the release r-1 of it."""
    home = Home(tmp_path / "home")
    home.create()
    (home.models / "b").mkdir()
    (home.models / "b" / "config.json").write_text("{}")
    release(home, MADE_BY)
    return home


def release(home: Home, made_by: str, **changed: Any) -> None:
    folder = home.releases / "r-1"
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text('{"r": 3}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    parts = ("datasets", "dataset_rows", "merge", "stages", "versions", "gates")
    manifest: dict[str, Any] = {part: {} for part in parts} | {"files": hashes(folder)}
    manifest |= {"release": "r-1", "state": "verified", "reason": "", "created": 1.0, "base": "b", "recipe_sha256": ""}
    manifest |= {"base_files": hashes(home.models / "b"), "recipe": tomllib.loads(made_by), **changed}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def start(home: Home, text: str = RECIPE) -> Recipe:
    return going_on(home, parse_recipe(text), home.models / "b")


def test_the_adapters_own_settings_and_its_hash_are_taken_over(home: Home) -> None:
    recipe = start(home)
    assert (recipe.adapter.kind, recipe.adapter.rank) == ("dora", 3)
    weights = home.releases / "r-1" / "adapter" / "adapter_model.safetensors"
    assert recipe.start == Start(release="r-1", sha256=sha256(weights), nudges=False)
    release(home, MADE_BY.replace('"sft"', '"dpo"'))
    assert start(home).start == Start(release="r-1", sha256=sha256(weights), nudges=True)


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ('kind = "dora"\nrank = 3', ""),
        ('kind = "dora"', ""),
        ('kind = "lora"', "its kind is not"),
        ("rank = 4", "its rank is not"),
        ("rank = 3\nalpha = 9", "its alpha is not"),
        ("alpha = 99", "its alpha is not"),
    ],
)
def test_other_settings_than_the_adapters_are_refused(home: Home, asked: str, fault: str) -> None:
    text = RECIPE.replace("[[stages]]", f"[adapter]\n{asked}\n[[stages]]")
    if fault:
        with pytest.raises(InvalidInput, match=fault):
            start(home, text)
    else:
        assert start(home, text).adapter.rank == 3


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_recipe_that_says_nothing_takes_any_settings(home: Home, kind: str) -> None:
    release(home, MADE_BY.replace('kind = "dora"\nrank = 3', f'kind = "{kind}"\nrank = 16\nalpha = 64'))
    assert start(home).adapter.alpha == 64


def test_the_model_thinks_on_as_it_did(home: Home) -> None:
    release(home, 'thinking = "on"\n' + MADE_BY)
    assert start(home).thinking == "on"
    assert start(home, 'thinking = "off"\n' + RECIPE).thinking == "off"


def test_a_recipe_that_starts_from_its_base_stays_as_it_is(home: Home) -> None:
    text = RECIPE.replace('start = "r-1"\n', "")
    assert start(home, text) == parse_recipe(text)
    copy_start(home, parse_recipe(text), home.runs)
    assert list(home.runs.iterdir()) == []


def test_the_run_gets_its_own_copy(home: Home) -> None:
    copy_start(home, start(home), home.runs)
    assert hashes(home.runs / "start") == hashes(home.releases / "r-1" / "adapter")


def test_a_release_that_is_not_what_was_proven_is_no_start(home: Home) -> None:
    release(home, MADE_BY, state="refused")
    with pytest.raises(Conflict, match="is refused"):
        start(home)
    release(home, MADE_BY)
    (home.releases / "r-1" / "adapter" / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(Conflict, match="not the one that its manifest names"):
        start(home)


def test_a_release_that_is_removed_meanwhile_is_said_to_be(home: Home) -> None:
    recipe = start(home)
    (home.releases / "r-1" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(Conflict, match="has changed meanwhile"):
        copy_start(home, recipe, home.runs)


def test_an_adapter_that_changes_meanwhile_is_not_taken(home: Home) -> None:
    recipe = start(home)
    (home.releases / "r-1" / "adapter" / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(Conflict, match="has changed meanwhile"):
        copy_start(home, recipe, home.runs)


def test_a_release_that_cannot_be_gone_on_with_is_refused(home: Home) -> None:
    with pytest.raises(NotFound, match="no release r-9"):
        start(home, RECIPE.replace("r-1", "r-9"))
    release(home, MADE_BY, base_files={"config.json": "another"})
    with pytest.raises(Conflict, match="trained on another base than b — train on its merged weights"):
        start(home)
    release(home, 'name = "r"\nbase = "b"\n[given]\nsha256 = "x"\n')
    with pytest.raises(InvalidInput, match="no adapter that was trained here"):
        start(home)
    release(home, MADE_BY)
    (home.releases / "r-1" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="no adapter"):
        start(home)
