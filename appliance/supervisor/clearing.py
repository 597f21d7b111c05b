"""Directories without a record and records without a directory, as a kill or a restored database leaves them."""

from __future__ import annotations

import logging
from pathlib import Path

from appliance import api
from appliance.api import ACTIVE
from appliance.home import Home, sha256
from appliance.release.manifest import MANIFEST, read_manifest
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.supervisor.served_models import UNREADABLE
from appliance.train.recipe import parse_recipe

log = logging.getLogger(__name__)


def clear_up(home: Home, runs: Runs, releases: Releases) -> None:
    """Put on record what has a directory, and end what has none. No file is removed.

    What cannot be read is left to `appliance gc`.
    """
    known = {run.id: run.state for run in runs.all()}
    for folder in _whole(home.runs):
        if folder.name not in known:
            _take_in_run(folder, runs)
    for run in runs.active():
        if not (home.runs / run.id).exists():
            runs.finish(run.id, "failed", f"its directory {home.runs / run.id} is missing", "queue its recipe again")
    recorded = {release.id: release.damage for release in releases.all()}
    for folder in _whole(home.releases):
        if folder.name not in recorded and known.get(folder.name) not in ACTIVE:
            _take_in_release(home, folder.name, releases)
    for id, damage in recorded.items():
        if not damage and not (home.releases / id).exists():
            releases.found_damaged(id, "its directory is missing")


def _take_in_run(folder: Path, runs: Runs) -> None:
    try:
        runs.add(folder.name, parse_recipe((folder / "recipe.toml").read_text()))
    except UNREADABLE as error:
        log.warning("%s is no run: %s", folder, error)
        return
    again = f"`appliance resume {folder.name}` queues it again"
    runs.finish(folder.name, "stopped", "nothing was on record of it but its directory", again)
    log.warning("the run %s is on record again, stopped", folder.name)


def _take_in_release(home: Home, id: str, releases: Releases) -> None:
    """As one from elsewhere: its reference answers are asked for before it answers anybody."""
    try:
        manifest = read_manifest(home, id)
        state: api.ReleaseState = "verified elsewhere" if manifest["state"] == "verified" else "refused"
        gates = {gate: bool(outcome["passed"]) for gate, outcome in manifest["gates"].items()}
        digest = sha256(home.releases / id / MANIFEST)
        said, made = manifest["reason"], manifest["created"]
        releases.add(id, manifest["base"], state, said, gates, promote=False, manifest_sha256=digest, created=made)
    except UNREADABLE as error:
        log.warning("%s is no release: %s", home.releases / id, error)
        return
    log.warning("the release %s is on record again", id)


def _whole(folder: Path) -> list[Path]:
    """What is not on its way to becoming a directory."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
