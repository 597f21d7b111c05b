"""The gates of a release once more, on its own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import events, failure, read_recipe, result, work

from appliance.errors import Conflict, Exit, InvalidInput, NotFound
from appliance.home import Home, building, hashes
from appliance.release.conclude import finalise, judge
from appliance.release.gates import Gate
from appliance.release.manifest import read_manifest
from appliance.release.recheck import plan_recheck, write_recheck
from appliance.train.recipe import dump_recipe, parse_recipe

PASSED = {"parity": Gate(True), "stopping": Gate(True)}


def release(home: Home, id: str) -> Path:
    """The release of a trained run, whose directory is gone, as on another box."""
    work(home.runs / id, "verify")
    assert finalise(home, id, read_recipe(home.runs / id), PASSED).state == "verified"
    shutil.rmtree(home.runs / id)
    return home.releases / id


def recheck(home: Home, id: str) -> Path:
    """The directory of a run that repeats its gates."""
    recipe = plan_recheck(home, id)
    with building(home.runs / "again") as directory:
        write_recheck(home, directory, recipe, id)
        (directory / "recipe.toml").write_text(dump_recipe(recipe))
    return home.runs / "again"


def gates(run: Path) -> dict[str, Any]:
    return {name: gate["passed"] for name, gate in result(run, "verify")["gates"].items()}


def change_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


@pytest.mark.parametrize("id", ["lora", "qlora", "dpo", "base"])
def test_what_was_verified_passes_again_on_its_own_files(home: Home, id: str) -> None:
    folder = release(home, id)
    before = hashes(folder)
    run = recheck(home, id)
    assert read_recipe(run).pipeline() == ("merge", "verify", "probe")
    assert work(run, "merge", "verify") == Exit.OK
    assert gates(run) == {"structure": True, "fidelity": True, "quality": True}
    assert (run / "merge" / "model").resolve() == folder.resolve()
    assert hashes(folder) == before
    found = judge(home, "again", read_recipe(run), PASSED)
    assert (found.state, found.files) == ("verified", read_manifest(home, id)["files"])


def test_of_one_that_was_only_nudged_the_base_is_asked_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    release(home, "nudged-dpo")
    asked: list[Path] = []

    def ask(base: Path, tokenizer: Any, probes: list[Any], log: Any) -> list[Any]:
        asked.append(base)
        return probes

    monkeypatch.setattr("appliance.release.verify.ask_base", ask)
    assert work(recheck(home, "nudged-dpo"), "merge", "verify") == Exit.OK
    assert len(asked) == 1


def test_damage_is_no_verdict_of_the_gates(home: Home) -> None:
    folder = release(home, "lora")
    run = recheck(home, "lora")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["code"] == "damaged_release"
    assert "lora is damaged: model.safetensors is not what its manifest says" in failure(run, "merge")["reason"]


def test_weights_that_were_changed_along_with_the_manifest_do_not_pass(home: Home) -> None:
    """As in an archive that agrees with itself."""
    folder = release(home, "lora")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    change_manifest(folder, files={file: hash for file, hash in hashes(folder).items() if file != "manifest.json"})
    run = recheck(home, "lora")
    assert work(run, "merge", "verify") == Exit.OK
    assert not all(gates(run).values())
    assert judge(home, "again", read_recipe(run), PASSED).state == "refused"


def test_without_its_dataset_plain_conversations_are_what_it_is_judged_on(home: Home) -> None:
    release(home, "lora")
    recipe = plan_recheck(home, "lora")
    assert recipe.given
    assert recipe.given.dataset
    for dataset in list(home.datasets.iterdir()):
        shutil.rmtree(dataset)
    run = recheck(home, "lora")
    assert "no dataset of lora is on this box" in events(run, "warning")[0]["message"]
    assert work(run, "merge", "verify") == Exit.OK
    assert all(gates(run).values())


def test_a_release_that_went_on_from_another_can_be_rechecked(home: Home) -> None:
    folder = release(home, "lora")
    recipe = json.loads((folder / "manifest.json").read_bytes())["recipe"]
    change_manifest(folder, recipe={**recipe, "start": {"release": "before", "sha256": "x"}})
    planned = plan_recheck(home, "lora")
    assert parse_recipe(dump_recipe(planned)) == planned
    assert planned.start is None


def test_killed_after_the_exchange_the_stage_is_done_again(home: Home) -> None:
    release(home, "lora")
    run = recheck(home, "lora")
    assert work(run, "merge") == Exit.OK
    (run / "merge" / "result.json").unlink()
    assert work(run, "merge", "verify") == Exit.OK
    assert all(gates(run).values())


def test_without_its_very_base_there_is_nothing_to_repeat(home: Home) -> None:
    folder = release(home, "lora")
    base_files = read_manifest(home, "lora")["base_files"]
    change_manifest(folder, base_files=base_files | {"config.json": "0"})
    with pytest.raises(Conflict, match=r"another tiny than is on this box: config\.json differs"):
        plan_recheck(home, "lora")
    shutil.rmtree(home.models / "tiny")
    with pytest.raises(NotFound, match="no base model tiny"):
        plan_recheck(home, "lora")


def test_what_its_own_gates_refused_or_another_version_made_is_not_judged_again(home: Home) -> None:
    folder = release(home, "base")
    change_manifest(folder, recipe={"unknown": 1})
    with pytest.raises(InvalidInput, match="another version"):
        plan_recheck(home, "base")
    change_manifest(folder, state="refused", reason="fidelity: no")
    with pytest.raises(Conflict, match="fidelity: no"):
        plan_recheck(home, "base")


def test_where_the_other_form_of_the_base_is_better_here_it_says_so(home: Home) -> None:
    folder = release(home, "qlora")
    merge = read_manifest(home, "qlora")["merge"]
    other = "16-bit" if merge["kept"] == "dequantised" else "dequantised"
    change_manifest(folder, merge=merge | {"kept": other})
    run = recheck(home, "qlora")
    assert work(run, "merge") == Exit.FAILED
    failure = json.loads((run / "merge" / "failure.json").read_bytes())
    assert f"merged into the {other} base, and here the {merge['kept']} one is better" in failure["reason"]
