"""From the measured gates of a run to its release: its manifest is written, and the model moves to the releases."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from appliance import __version__
from appliance.archive import CARD
from appliance.home import Home, fsync_directory, write_atomic, write_json
from appliance.models import SOURCE
from appliance.release.card import model_card
from appliance.release.gates import GATES, UNMEASURED, Gate
from appliance.release.manifest import ALL_PASSED, MANIFEST, Manifest, read_manifest, refusal
from appliance.train.recipe import Recipe

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def finalise(
    home: Home, run_id: str, recipe: Recipe, probe_gates: dict[str, Gate], reference: dict[str, Any] | None = None
) -> Manifest:
    """Write the manifest of a run's merged model and move it to `releases/`, verified or refused.

    `probe_gates` has gates 3 and 4, and as `served` what the engine's own log-probabilities say of gate 2. They may be
    missing where verify has failed already, and count as not passed.
    `reference` is what the probed engine answered.
    Safe to repeat after a kill at any moment: a release that exists is returned as it is.
    """
    final = home.releases / run_id
    if not final.exists():
        model = home.runs / run_id / "merge" / "model"
        for left_by_a_kill in model.glob(".*.tmp"):
            left_by_a_kill.unlink()
        manifest = replace(_manifest(home.runs / run_id, recipe, probe_gates), reference=reference or {})
        card = model_card(manifest, _source(home, recipe.base)).encode()
        write_atomic(model / CARD, card)
        files = manifest.files | {CARD: hashlib.sha256(card).hexdigest()}
        write_json(model / MANIFEST, asdict(replace(manifest, files=files)))
        os.rename(model, final)
        fsync_directory(home.releases)
        fsync_directory(home.runs / run_id / "merge")
    return Manifest(**read_manifest(home, run_id))


def judge(home: Home, run_id: str, recipe: Recipe, probe_gates: dict[str, Gate]) -> Manifest:
    """What the manifest of a run says whose gates have been measured. Nothing is written."""
    return _manifest(home.runs / run_id, recipe, probe_gates)


def _manifest(run: Path, recipe: Recipe, probe_gates: dict[str, Gate]) -> Manifest:
    merge = _read(run / "merge" / "result.json")
    measured: dict[str, Any] = _read(run / "verify" / "result.json")["gates"]
    measured |= {name: asdict(gate) for name, gate in probe_gates.items() if name != "served"}
    if "served" in probe_gates:
        measured["fidelity"] = _with_served(measured["fidelity"], probe_gates["served"])
    unmeasured = asdict(Gate(False, {}, f"{UNMEASURED}another gate had failed"))
    gates = {name: measured.get(name, unmeasured) for name in GATES}
    passed = all(gate["passed"] for gate in gates.values())
    state: Literal["verified", "refused"] = "verified" if passed else "refused"
    reason = ALL_PASSED if passed else refusal(gates)
    return Manifest(
        release=run.name,
        state=state,
        reason=reason,
        created=round(time.time(), 3),
        base=recipe.base,
        datasets=recipe.datasets,
        dataset_rows=merge["dataset_rows"],
        gates=gates,
        merge={name: merge[name] for name in ("kept", "trained_on", "on", "losses", "rows", "tokens") if name in merge},
        stages={stage.name: _read(run / stage.name / "result.json") for stage in recipe.chain()},
        files=merge["files"],
        base_files=merge["base_files"],
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        recipe_sha256=merge["recipe_sha256"],
        versions={
            "appliance": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    )


def _with_served(fidelity: dict[str, Any], served: Gate) -> dict[str, Any]:
    """Gate 2 with the figures of what is served beside those of the files."""
    failed = [gate["reason"] for gate in (fidelity, asdict(served)) if not gate["passed"]]
    return {
        "passed": not failed,
        "figures": fidelity["figures"] | {"served": served.figures},
        "reason": "; ".join(failed or [fidelity["reason"], served.reason]),
    }


def _source(home: Home, base: str) -> dict[str, Any]:
    """Where the base came from; empty where nothing says so."""
    path = home.models / base / SOURCE
    return _read(path) if path.exists() else {}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content
