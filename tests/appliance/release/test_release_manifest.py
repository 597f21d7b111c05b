"""The manifest makes a release of a run, once, whatever is killed on the way."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from tiny import read_recipe, work

from appliance.errors import NotFound
from appliance.home import Home
from appliance.release.gates import GATES, Gate
from appliance.release.manifest import Manifest, finalise, read_manifest

PASSED = {"parity": Gate(True, {"equal": 3}, "equal"), "stopping": Gate(True, {}, "all stop")}


def finish(home: Home, gates: dict[str, Gate] = PASSED, id: str = "lora") -> Manifest:
    run = home.runs / id
    work(run, "verify")
    return finalise(home, id, read_recipe(run), gates)


def test_a_run_whose_gates_all_passed_becomes_a_verified_release(home: Home) -> None:
    manifest = finish(home)
    assert manifest.state == "verified"
    assert list(manifest.gates) == list(GATES)
    assert manifest.gates["parity"] == {"passed": True, "figures": {"equal": 3}, "reason": "equal"}
    assert not (home.runs / "lora" / "merge" / "model").exists()

    release = home.releases / "lora"
    assert json.loads((release / "manifest.json").read_bytes()) == read_manifest(home, "lora")
    assert Manifest(**read_manifest(home, "lora")) == manifest
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in release.iterdir()
        if path.name != "manifest.json"
    }
    assert manifest.files == hashes
    weights = home.models / "tiny" / "model.safetensors"
    assert manifest.base_weights == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert set(manifest.datasets) == {"sft"}
    assert manifest.stages["sft"]["held_out_loss"] < manifest.stages["sft"]["held_out_loss_before"]
    assert manifest.merge["losses"].keys() == {"adapter", "16-bit"}
    assert manifest.recipe == read_recipe(home.runs / "lora").model_dump(mode="json")
    assert manifest.versions["torch"].startswith("2.")


def test_a_gate_that_did_not_pass_refuses_the_release(home: Home) -> None:
    manifest = finish(home, {**PASSED, "stopping": Gate(False, {}, "1 of 3 answers do not end")})
    assert manifest.state == "refused"
    assert manifest.reason == "stopping: 1 of 3 answers do not end"


def test_a_gate_that_was_not_measured_refuses_it_too(home: Home) -> None:
    manifest = finish(home, {"parity": PASSED["parity"]})
    assert manifest.state == "refused"
    assert manifest.reason.startswith("stopping: not measured")


def test_where_verify_has_failed_the_engine_need_not_be_asked(home: Home) -> None:
    work(home.runs / "lora", "verify")
    path = home.runs / "lora" / "verify" / "result.json"
    result = json.loads(path.read_bytes())
    result["gates"]["fidelity"] = {"passed": False, "figures": {}, "reason": "too far apart"}
    path.write_text(json.dumps(result))
    manifest = finalise(home, "lora", read_recipe(home.runs / "lora"), {})
    assert (manifest.state, manifest.reason) == ("refused", "fidelity: too far apart")
    assert manifest.gates["parity"]["passed"] is False


def test_called_again_it_returns_what_there_is(home: Home) -> None:
    first = finish(home)
    assert finalise(home, "lora", read_recipe(home.runs / "lora"), {}) == first


@pytest.mark.parametrize("moment", ["before the manifest", "before the move", "after the move"])
def test_killed_at_any_moment_it_ends_right_when_called_again(
    home: Home, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        match moment:
            case "before the manifest":
                patch.setattr("appliance.release.manifest.write_json", die)
            case "before the move":
                patch.setattr(os, "rename", die)
            case "after the move":
                patch.setattr("appliance.release.manifest.fsync_directory", die)
        with pytest.raises(KeyboardInterrupt):
            finish(home)
    assert finalise(home, "lora", read_recipe(home.runs / "lora"), PASSED).state == "verified"
    assert (home.releases / "lora" / "manifest.json").exists()
    assert not (home.runs / "lora" / "merge" / "model").exists()


def test_a_release_of_the_base_itself(home: Home) -> None:
    manifest = finish(home, id="base")
    assert manifest.state == "verified"
    assert manifest.datasets == manifest.stages == {}


def test_an_unknown_release_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_manifest(Home(tmp_path), "none")
