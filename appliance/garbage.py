"""What nothing refers to any more. The live release, the one before it and the newest stay; so does what runs need."""

from __future__ import annotations

import contextlib
import shutil
import time
import tomllib
from collections.abc import Set
from pathlib import Path

from appliance import api
from appliance.errors import ApplianceError
from appliance.home import Home
from appliance.release.manifest import read_manifest
from appliance.store.datasets import Datasets
from appliance.store.releases import Releases
from appliance.store.runs import Runs

LEFTOVER_SECONDS = 24 * 3600.0
"""What nothing refers to yet may still be coming into being when it is younger than this."""
UNCOMPILED_SECONDS = 30 * 24 * 3600.0
"""Compiled code goes when nothing of it was written for so long: the next start that needs it compiles it again."""
_COMPILED = (
    "vllm/torch_compile_cache/[!t]*",
    "vllm/torch_compile_cache/torch_aot_compile/*",
    "triton/*",
    "inductor/*",
)
"""Below the home's folder for it, what belongs together."""


def find_garbage(
    home: Home, releases: Releases, runs: Runs, datasets: Datasets, serving: Set[str], keep: int
) -> api.Garbage:
    """What `remove_garbage` would remove. The newest `keep` whole releases stay, and what engines are `serving`."""
    oldest = time.time() - LEFTOVER_SECONDS
    every = releases.all()
    whole = [release.id for release in every if not release.damage]
    known = {run.id for run in runs.all()}
    lost = [home.runs / id for id in _names(home.runs, oldest) if id not in known]
    kept = {*whole[:keep]} | releases.needed() | serving | _rechecked(home, runs)
    unfinished = {run.id for run in runs.all() if run.state != "finished"}
    recorded = {release.id for release in every}
    old = [id for id in recorded if id not in kept]
    unrecorded = [id for id in _names(home.releases, oldest) if id not in recorded | unfinished]
    named, needed = {dataset.id for dataset in datasets.all()}, dataset_users(home, runs).keys()
    unnamed = [id for id in _names(home.datasets, oldest) if id not in named | needed]
    leftovers = lost + [
        path
        for folder in (home.models, home.datasets, home.runs, home.releases, home.incoming)
        for path in folder.iterdir()
        if (folder == home.incoming or path.name.startswith(".")) and _written_to(path) < oldest
    ]
    stale = time.time() - UNCOMPILED_SECONDS
    leftovers += [one for kind in _COMPILED for one in home.compiled.glob(kind) if _written_to(one) < stale]
    doomed = [*(home.releases / id for id in (*old, *unrecorded)), *(home.datasets / id for id in unnamed), *leftovers]
    return api.Garbage(
        releases=tuple(sorted((*old, *unrecorded))),
        datasets=tuple(sorted(unnamed)),
        leftovers=tuple(sorted(path.relative_to(home.root).as_posix() for path in leftovers)),
        bytes=sum(map(_size, doomed)),
    )


def forget_garbage(garbage: api.Garbage, releases: Releases) -> None:
    """Take the releases out of the records, before their files go."""
    for id in garbage.releases:
        releases.remove(id)


def remove_garbage(home: Home, garbage: api.Garbage) -> None:
    """Remove the files. Safe to repeat: what a kill has left is found again."""
    for id in garbage.releases:
        shutil.rmtree(home.releases / id, ignore_errors=True)
        (home.engines / f"{id}.log").unlink(missing_ok=True)
    for id in garbage.datasets:
        shutil.rmtree(home.datasets / id, ignore_errors=True)
    for name in garbage.leftovers:
        path = home.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def dataset_users(home: Home, runs: Runs) -> dict[str, str]:
    """What needs each dataset: a run that has not finished, or a release. Recipes of whatever version are read.

    For a release whose manifest is damaged, the recipe of its run speaks.
    """
    users: dict[str, str] = {}
    damaged: set[str] = set()
    for release in (path.parent.name for path in home.releases.glob("*/manifest.json")):
        try:
            needed = read_manifest(home, release)["datasets"].values()
        except ApplianceError:
            damaged.add(release)
            continue
        for dataset in needed:
            users.setdefault(dataset, f"release {release}")
    states: dict[str, str] = {run.id: run.state for run in runs.all()}
    for path in home.runs.glob("*/recipe.toml"):
        state = states.get(path.parent.name, "new")
        if state != "finished" or path.parent.name in damaged:
            recipe = tomllib.loads(path.read_text())
            for part in (*recipe.get("stages", ()), recipe.get("given", {})):
                users.setdefault(part.get("dataset", ""), f"run {path.parent.name} ({state})")
    return users


def _rechecked(home: Home, runs: Runs) -> set[str]:
    """Releases whose gates a run is to repeat."""
    active = {run.id for run in runs.active()}
    paths = (path for path in home.runs.glob("*/recipe.toml") if path.parent.name in active)
    return {recipe.get("rechecks", "") for recipe in (tomllib.loads(path.read_text()) for path in paths)}


def _names(folder: Path, oldest: float) -> list[str]:
    """Whole directories that are older than that."""
    return [path.name for path in folder.iterdir() if path.name[0] != "." and path.stat().st_mtime < oldest]


def _written_to(path: Path) -> float:
    """When a file, or the last of those below a directory, was written to: a download may take a day."""
    found = [path.lstat().st_mtime]
    for one in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(one.lstat().st_mtime)
    return max(found)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory, that go when it goes: not those with another name."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(stat.st_size for stat in (file.lstat() for file in files if file.is_file()) if stat.st_nlink == 1)
