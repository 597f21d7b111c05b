"""The manifest, which makes model files a release: all gates, what it was made of, and by what. No torch here."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from appliance.errors import NotFound
from appliance.home import Home, fsync_directory, write_json
from appliance.release.gates import GATES, Gate
from appliance.train.recipe import Recipe

MANIFEST = "manifest.json"
_PACKAGES = ("finetune-appliance", "torch", "transformers", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    release: str
    state: Literal["verified", "refused"]
    reason: str
    """One line: that every gate has passed, or why the first that has not did not."""
    created: float
    base: str
    datasets: dict[str, str]
    """Dataset id of each training stage."""
    gates: dict[str, dict[str, Any]]
    """`passed`, `figures` and `reason` of each of the five."""
    merge: dict[str, Any]
    """Which base the adapter was merged into, and the held-out losses that decided it."""
    stages: dict[str, dict[str, Any]]
    """Figures of each training stage."""
    files: dict[str, str]
    """SHA-256 of every other file of the release."""
    base_weights: dict[str, str]
    """SHA-256 of the base's weight files."""
    recipe: dict[str, Any]
    versions: dict[str, str]


def finalise(home: Home, run_id: str, recipe: Recipe, probe_gates: dict[str, Gate]) -> Manifest:
    """Write the manifest of a run's merged model and move it to `releases/`, verified or refused.

    `probe_gates` has gates 3 and 4; they may be missing where verify has failed already, and count as not passed.
    Safe to repeat after a kill at any moment: a release that exists is returned as it is.
    """
    final = home.releases / run_id
    if not final.exists():
        model = home.runs / run_id / "merge" / "model"
        write_json(model / MANIFEST, asdict(_manifest(home.runs / run_id, recipe, probe_gates)))
        os.rename(model, final)
        fsync_directory(home.releases)
        fsync_directory(home.runs / run_id / "merge")
    return Manifest(**read_manifest(home, run_id))


def read_manifest(home: Home, release_id: str) -> dict[str, Any]:
    """The manifest of a release as it is on disk. Raises NotFound."""
    try:
        manifest: dict[str, Any] = json.loads((home.releases / release_id / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise NotFound("no_such_release", f"there is no release {release_id}", "see `appliance releases`") from None
    return manifest


def _manifest(run: Path, recipe: Recipe, probe_gates: dict[str, Gate]) -> Manifest:
    merge = _read(run / "merge" / "result.json")
    measured: dict[str, Any] = _read(run / "verify" / "result.json")["gates"]
    measured |= {name: asdict(gate) for name, gate in probe_gates.items()}
    unmeasured = asdict(Gate(False, {}, "not measured, because another gate had failed"))
    gates = {name: measured.get(name, unmeasured) for name in GATES}
    failed = [name for name in GATES if name in measured and not gates[name]["passed"]]
    missing = [name for name in GATES if name not in measured]
    state: Literal["verified", "refused"] = "refused" if failed or missing else "verified"
    reason = f"all {len(GATES)} gates passed"
    if state == "refused":
        first = (failed or missing)[0]
        reason = f"{first}: {gates[first]['reason']}"
    return Manifest(
        release=run.name,
        state=state,
        reason=reason,
        created=round(time.time(), 3),
        base=recipe.base,
        datasets={stage.name: stage.dataset for stage in recipe.stages},
        gates=gates,
        merge={"kept": merge["kept"], "losses": merge["losses"]},
        stages={stage.name: _read(run / stage.name / "result.json") for stage in recipe.stages},
        files=merge["files"],
        base_weights=merge["base_weights"],
        recipe=recipe.model_dump(mode="json"),
        versions={package: version(package) for package in _PACKAGES} | {"python": platform.python_version()},
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content
