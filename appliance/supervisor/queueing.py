"""How a run comes to be: its directory whole, then its record, or neither."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.home import Home, building, write_atomic
from appliance.store.runs import Runs
from appliance.train.recipe import Recipe, dump_recipe


@contextmanager
def queueing(home: Home, runs: Runs, recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Yield the id of a new run and the directory to be filled for it, which has its recipe; then queue the run.

    Where it cannot be put on record its directory is taken away again. A kill in between leaves a directory, which the
    next daemon puts on record (`clearing.py`).
    """
    id = runs.new_id(recipe, taken=[_meant(path.name) for path in home.runs.iterdir()])
    with building(home.runs / id) as directory:
        write_atomic(directory / "recipe.toml", dump_recipe(recipe).encode())
        yield id, directory
    try:
        runs.add(id, recipe)
    except BaseException:
        shutil.rmtree(home.runs / id, ignore_errors=True)
        raise


def _meant(name: str) -> str:
    """The id of the run whose directory this is, or is on its way to being."""
    return name.removeprefix(".").removesuffix(".building")
