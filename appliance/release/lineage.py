"""A run that goes on with the adapter of a release on the same base, of which it gets a copy. No torch here."""

from __future__ import annotations

import shutil
from pathlib import Path

from appliance.adapters import CONFIG, WEIGHTS
from appliance.errors import Conflict, InvalidInput
from appliance.home import Home, sha256
from appliance.models import base_hashes
from appliance.release.manifest import read_manifest
from appliance.train.recipe import Adapter, Recipe

_AS_A_BASE = "train on its merged weights instead: `appliance pull NAME --from {}`, with that name as the base"


def going_on(home: Home, recipe: Recipe, base: Path) -> Recipe:
    """The recipe with what it takes over from the release that it starts from, where it names one.

    Raises NotFound, and Conflict or InvalidInput for a release whose adapter cannot be trained further on `base`.
    """
    if recipe.start is None:
        return recipe
    release = recipe.start.release
    manifest = read_manifest(home, release)
    made_by = Recipe.model_validate(manifest["recipe"])
    weights = home.releases / release / "adapter" / WEIGHTS
    if not weights.is_file() or not made_by.stages:
        raise InvalidInput(
            "no_adapter_to_start_from",
            f"release {release} has no adapter that was trained here",
            _AS_A_BASE.format(release),
        )
    if any(manifest["base_files"].get(name) != hash for name, hash in base_hashes(base).items()):
        raise Conflict(
            "another_base",
            f"release {release} was trained on another base than {base.name}",
            _AS_A_BASE.format(release),
        )
    if manifest["files"].get(f"adapter/{WEIGHTS}") not in (None, sha256(weights)) or manifest["state"] != "verified":
        raise Conflict(
            "unfit_release",
            f"release {release} is {manifest['state']}, or its adapter is not the one that its manifest names",
            "start from a verified release",
        )
    if other := _other_settings(recipe.adapter, made_by.adapter):
        raise InvalidInput(
            "another_adapter",
            f"the adapter of release {release} goes on with its own settings, and its {other[0]} is not the recipe's",
            "take [adapter] out",
        )
    start = recipe.start.model_copy(update={"sha256": sha256(weights), "nudges": made_by.only_nudges})
    thinking = made_by.thinking if recipe.thinking == "auto" else recipe.thinking
    return recipe.model_copy(update={"start": start, "adapter": made_by.adapter, "thinking": thinking})


def _other_settings(asked: Adapter, made: Adapter) -> list[str]:
    """The keys that a recipe names under [adapter] and that an adapter was made with otherwise."""
    named = asked.model_fields_set
    if asked.alpha == Adapter(kind=asked.kind, rank=asked.rank).alpha:
        named = named - {"alpha"}  # it follows from the others, and is filled in where a recipe says none
    return sorted(key for key in named if getattr(asked, key) != getattr(made, key))


def copy_start(home: Home, recipe: Recipe, run: Path) -> None:
    """Give the run's directory the adapter that it starts from, where it starts from one. Raises Conflict."""
    if recipe.start is None:
        return
    source = home.releases / recipe.start.release / "adapter"
    (run / "start").mkdir()
    try:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, run / "start" / name)
        changed = sha256(run / "start" / WEIGHTS) != recipe.start.sha256
    except FileNotFoundError:
        changed = True
    if changed:
        raise Conflict("release_changed", f"release {recipe.start.release} has changed meanwhile", "queue it again")
