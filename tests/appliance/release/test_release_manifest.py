"""The manifest makes a release of a run, once, whatever is killed on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
from tiny import add_run, read_recipe, stage, work

from appliance.errors import ApplianceError, Conflict, NotFound
from appliance.home import Home, hashes
from appliance.release.conclude import finalise
from appliance.release.gates import GATES, Gate
from appliance.release.manifest import Manifest, accept_quality, read_manifest
from appliance.train.recipe import Recipe, parse_recipe

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
    found = hashes(release)
    del found["manifest.json"]
    assert manifest.files == found
    assert {"model.safetensors", "README.md", "adapter/adapter_model.safetensors"} <= found.keys()
    assert manifest.base_files == hashes(home.models / "tiny")
    rows = home.datasets / manifest.datasets["sft"] / "rows.jsonl"
    assert manifest.dataset_rows == {manifest.datasets["sft"]: hashlib.sha256(rows.read_bytes()).hexdigest()}
    recipe = (home.runs / "lora" / "recipe.toml").read_bytes()
    assert manifest.recipe_sha256 == hashlib.sha256(recipe).hexdigest()
    assert set(manifest.datasets) == {"sft"}
    assert manifest.stages["sft"]["held_out_loss"] < manifest.stages["sft"]["held_out_loss_before"]
    assert manifest.merge["losses"].keys() == {"adapter", "16-bit"}
    assert Recipe.model_validate(manifest.recipe) == read_recipe(home.runs / "lora")
    assert manifest.versions["torch"].startswith("2.")


def test_the_manifest_names_the_stages_that_are_in_the_release_alone(home: Home) -> None:
    aside = stage("dpo", "PREFERENCES", max_steps=2) + stage(
        "sft", "FACTS", max_steps=2, name="again", **{"from": "sft"}
    )
    run = add_run(home, "graph", stage("sft", "FACTS", max_steps=2) + aside)
    recipe = read_recipe(run)
    assert work(run, *recipe.pipeline()[:-1]) == 0
    manifest = finalise(home, "graph", recipe, PASSED)
    assert list(manifest.stages) == ["sft", "again"]
    assert list(manifest.datasets) == ["sft", "again"]
    assert manifest.dataset_rows.keys() == {manifest.datasets["sft"]}
    before = json.loads((run / "sft" / "result.json").read_bytes())
    assert manifest.stages["sft"]["adapter_sha256"] == before["adapter_sha256"]


def test_a_gate_that_did_not_pass_refuses_the_release(home: Home) -> None:
    manifest = finish(home, {**PASSED, "stopping": Gate(False, {}, "1 of 3 answers do not end")})
    assert manifest.state == "refused"
    assert manifest.reason == "stopping: 1 of 3 answers do not end"


def test_a_loss_that_training_has_not_lowered_is_a_line_of_the_card(home: Home) -> None:
    path = home.runs / "lora" / "sft" / "result.json"
    figures = json.loads(path.read_bytes())
    assert figures["warnings"] == []
    path.write_text(
        json.dumps(figures | {"warnings": ["the held-out loss is no lower after sft: 3.1, and 2.9 before"]})
    )
    finish(home)
    card = (home.releases / "lora" / "README.md").read_text()
    assert "\n- Warning: the held-out loss is no lower after sft: 3.1, and 2.9 before\n" in card


@pytest.mark.parametrize("passed", [True, False])
def test_what_the_engine_says_of_fidelity_stands_beside_what_the_files_say(home: Home, passed: bool) -> None:
    manifest = finish(home, {**PASSED, "served": Gate(passed, {"tokens": 9}, "the engine is apart")})
    assert manifest.state == ("verified" if passed else "refused")
    fidelity = manifest.gates["fidelity"]
    assert list(manifest.gates) == list(GATES)
    assert fidelity["passed"] == passed
    assert fidelity["figures"]["served"] == {"tokens": 9}
    assert fidelity["figures"]["tokens"] > 9
    assert fidelity["reason"].endswith("the engine is apart")
    assert ("divergence" in fidelity["reason"]) == passed


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


def fail(home: Home, *gates: str) -> None:
    """Let gates of verify have failed for the run `lora`."""
    work(home.runs / "lora", "verify")
    path = home.runs / "lora" / "verify" / "result.json"
    result = json.loads(path.read_bytes())
    for gate in gates:
        result["gates"][gate] |= {"passed": False, "reason": f"{gate} is bad"}
    path.write_text(json.dumps(result))


def test_quality_alone_can_be_accepted_and_the_manifest_says_so(home: Home) -> None:
    fail(home, "quality")
    refused = finalise(home, "lora", read_recipe(home.runs / "lora"), PASSED)
    assert (refused.state, refused.reason, refused.accepted) == ("refused", "quality: quality is bad", {})
    before = hashes(home.releases / "lora")
    recorded = hashes(home.releases / "lora")["manifest.json"]
    accepted = accept_quality(home, "lora", recorded, "quality: quality is bad")
    assert accepted.state == "verified"
    assert accepted.reason == "accepted by the operator in spite of quality: quality is bad"
    assert accepted.accepted.keys() == {"quality"}
    assert accepted.gates == refused.gates
    assert accepted.files == refused.files
    changed = {name for name, digest in hashes(home.releases / "lora").items() if before[name] != digest}
    assert changed == {"manifest.json"}
    again = accept_quality(home, "lora", recorded, "quality: quality is bad")
    assert again == accepted == Manifest(**read_manifest(home, "lora")), "as after a kill before it was recorded"


@pytest.mark.parametrize("gates", [("fidelity",), ("fidelity", "quality")])
def test_no_other_gate_can_be_accepted(home: Home, gates: tuple[str, ...]) -> None:
    fail(home, *gates)
    manifest = finalise(home, "lora", read_recipe(home.runs / "lora"), PASSED)
    with pytest.raises(Conflict, match="refused: fidelity: fidelity is bad"):
        accept_quality(home, "lora", hashes(home.releases / "lora")["manifest.json"], manifest.reason)
    assert Manifest(**read_manifest(home, "lora")) == manifest


@pytest.mark.parametrize("accepted_before", [False, True])
def test_a_manifest_that_is_not_the_recorded_one_is_not_accepted(home: Home, accepted_before: bool) -> None:
    """Neither one that says of itself that it was verified, or accepted."""
    fail(home, "fidelity")
    finalise(home, "lora", read_recipe(home.runs / "lora"), PASSED)
    path = home.releases / "lora" / "manifest.json"
    recorded = hashes(home.releases / "lora")["manifest.json"]
    forged = json.loads(path.read_bytes()) | {"state": "verified"}
    if accepted_before:
        forged["accepted"] = {"quality": 1.0}
        forged["gates"]["fidelity"]["passed"] = True
    path.write_text(json.dumps(forged))
    with pytest.raises(Conflict, match=r"manifest\.json is not the one that was recorded"):
        accept_quality(home, "lora", recorded, forged["reason"])


def test_an_acceptance_that_was_killed_leaves_no_file_behind(home: Home) -> None:
    fail(home, "quality")
    finalise(home, "lora", read_recipe(home.runs / "lora"), PASSED)
    folder = home.releases / "lora"
    (folder / ".manifest.json.1.tmp").write_text("{")
    before = set(hashes(folder))
    recorded = hashes(folder)["manifest.json"]
    assert accept_quality(home, "lora", recorded, "quality: quality is bad").state == "verified"
    assert before - set(hashes(folder)) == {".manifest.json.1.tmp"}


def test_the_card_states_base_data_recipe_figures_and_licence(home: Home) -> None:
    (home.models / "tiny" / "source.json").write_text('{"source": "hub:someone/tiny@abc", "licence": "apache-2.0"}')
    manifest = finish(home)
    card = (home.releases / "lora" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert head.splitlines()[:2] == ['base_model: "someone/tiny"', 'license: "apache-2.0"']
    assert "Licence of the base: apache-2.0" in body
    assert manifest.datasets["sft"] in body
    assert manifest.dataset_rows[manifest.datasets["sft"]] in body
    assert f"| adapter | {manifest.merge['losses']['adapter']:.4f} |" in body
    for name, gate in manifest.gates.items():
        assert f"| {name} | passed | {gate['reason']} |" in body
    toml = body.partition("```toml\n")[2].partition("```")[0]
    assert parse_recipe(toml) == read_recipe(home.runs / "lora")


@pytest.mark.parametrize("moment", ["before the manifest", "before the move", "after the move"])
def test_killed_at_any_moment_it_ends_right_when_called_again(
    home: Home, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        match moment:
            case "before the manifest":
                patch.setattr("appliance.release.conclude.write_json", die)
            case "before the move":
                patch.setattr(os, "rename", die)
            case "after the move":
                patch.setattr("appliance.release.conclude.fsync_directory", die)
        with pytest.raises(KeyboardInterrupt):
            finish(home)
    assert finalise(home, "lora", read_recipe(home.runs / "lora"), PASSED).state == "verified"
    assert (home.releases / "lora" / "manifest.json").exists()
    assert not (home.runs / "lora" / "merge" / "model").exists()


def test_a_release_of_the_base_itself(home: Home) -> None:
    manifest = finish(home, id="base")
    assert manifest.state == "verified"
    assert manifest.datasets == manifest.stages == {}


@pytest.mark.parametrize("change", [{"recipe": []}, {"datasets": ["x"]}, {"files": [1]}, {"created": "then"}])
def test_a_manifest_of_other_types_is_a_damaged_one(tmp_path: Path, change: dict[str, object]) -> None:
    fields = {each.name: {} for each in dataclasses.fields(Manifest)}
    whole = fields | {
        "release": "r-1",
        "state": "verified",
        "reason": "",
        "created": 1,
        "base": "b",
        "recipe_sha256": "",
    }
    path = tmp_path / "releases" / "r-1" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(whole))
    assert read_manifest(Home(tmp_path), "r-1") == whole
    path.write_text(json.dumps(whole | change))
    with pytest.raises(ApplianceError, match=f"cannot be read: '{next(iter(change))}"):
        read_manifest(Home(tmp_path), "r-1")


@pytest.mark.parametrize("content", [b"", b'{"release": "r-1", "fi', b"[]", b"7", b"\xff", b'{"files": {}}', None])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "releases" / "r-1" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ApplianceError, match="the manifest of release r-1 cannot be read: ") as caught:
        read_manifest(Home(tmp_path), "r-1")
    assert "\n" not in str(caught.value)


def test_an_unknown_release_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_manifest(Home(tmp_path), "none")
