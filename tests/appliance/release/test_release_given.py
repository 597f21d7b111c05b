"""Adapters trained elsewhere: merged and verified as the run's own are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FACTS, add_dataset, failure, read_recipe, result, work

from appliance.errors import Exit
from appliance.home import Home, hashes, sha256
from appliance.release.conclude import finalise
from appliance.release.gates import Gate, load_probes
from appliance.release.given import GivenRequest, main
from appliance.train.recipe import Given, Recipe, dump_recipe

PROBED = {"parity": Gate(True), "stopping": Gate(True)}


def given(home: Home, *, dataset: str = "", quantised: bool = False) -> Path:
    """A run that is given the adapter of another."""
    run = home.runs / "given-1"
    trained = home.runs / ("qlora" if quantised else "lora") / "sft" / "adapter"
    shutil.copytree(trained, run / "adapter")
    about = Given(sha256=sha256(run / "adapter" / "adapter_model.safetensors"), quantised=quantised, dataset=dataset)
    (run / "recipe.toml").write_text(dump_recipe(Recipe(name="given", base="tiny", given=about)))
    assert read_recipe(run).given == about
    return run


def test_it_becomes_the_release_that_its_own_run_made(home: Home) -> None:
    run = given(home)
    assert work(run, "merge", "verify") == 0
    own = hashes(home.runs / "lora" / "merge" / "model")
    assert hashes(run / "merge" / "model") == own
    gates = result(run, "verify")["gates"]
    assert all(gate["passed"] for gate in gates.values()), gates
    assert gates["fidelity"]["figures"]["merged_loss"] == pytest.approx(
        gates["fidelity"]["figures"]["adapter_loss"], abs=1e-4
    )
    assert len(load_probes(run)) == 2
    manifest = finalise(home, "given-1", read_recipe(run), PROBED)
    assert manifest.state == "verified"
    assert (manifest.datasets, manifest.stages) == ({}, {})
    card = (home.releases / "given-1" / "README.md").read_text()
    assert "an adapter that was trained elsewhere" in card


def test_a_dataset_named_is_what_it_is_judged_on(home: Home) -> None:
    run = given(home, dataset=add_dataset(home, "facts", FACTS))
    assert work(run, "merge", "verify") == 0
    assert result(run, "merge")["rows"] == 1, "a tenth of the prompts is held out"
    assert any("What colour" in probe.messages[-1]["content"] for probe in load_probes(run))
    manifest = finalise(home, "given-1", read_recipe(run), PROBED)
    assert manifest.datasets.keys() == {"given"}
    assert manifest.dataset_rows.keys() == set(manifest.datasets.values())


def test_of_one_trained_in_nf4_both_bases_are_tried(home: Home) -> None:
    run = given(home, quantised=True)
    assert work(run, "merge") == 0
    assert result(run, "merge")["losses"].keys() == {"adapter", "16-bit", "dequantised"}


def test_what_is_wrong_with_it_is_caught_without_data(home: Home) -> None:
    """Without a dataset the gates have a few plain questions to compare on, and a wrong scale shows in those too."""
    run = given(home)
    assert work(run, "merge") == 0
    base = load_file(home.models / "tiny" / "model.safetensors")
    path = run / "merge" / "model" / "model.safetensors"
    tensors = {name: base[name] + 0.5 * (tensor - base[name]) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert work(run, "verify") == 0
    assert not result(run, "verify")["gates"]["fidelity"]["passed"]


def test_one_that_cannot_be_merged_fails_by_name(home: Home) -> None:
    run = given(home)
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, path)
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["reason"] == "the adapter is not the one that was given"
    recipe = read_recipe(run)
    about = Given(sha256=sha256(path))
    (run / "recipe.toml").write_text(dump_recipe(recipe.model_copy(update={"given": about})))
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["code"] == "not_mergeable"
    assert "no module model.layers.7.mlp.up_proj" in failure(run, "merge")["reason"]


def test_one_that_lacks_layers_of_its_settings_fails_by_name(home: Home) -> None:
    run = given(home)
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "layers.1." not in name}, path)
    recipe = read_recipe(run)
    about = Given(sha256=sha256(path))
    (run / "recipe.toml").write_text(dump_recipe(recipe.model_copy(update={"given": about})))
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["code"] == "not_mergeable"
    assert "its file lacks 7 of them, such as model.layers.1." in failure(run, "merge")["reason"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda tensors: {name.replace("mlp.up_proj", "mlp.fc1"): one for name, one in tensors.items()}, "no module"),
        (
            lambda tensors: {name: one[:, :7] if "lora_A" in name else one for name, one in tensors.items()},
            "which the adapter does not fit",
        ),
        (lambda tensors: {name: one for name, one in tensors.items() if "layers.1." not in name}, "lacks 7 of them"),
    ],
    ids=["of-another-architecture", "of-another-size", "not-whole"],
)
def test_what_would_end_the_merge_is_said_before_a_run_is_queued(
    home: Home, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], why: str
) -> None:
    def problem(adapter: Path) -> dict[str, Any]:
        request = tmp_path / "request.json"
        request.write_text(GivenRequest(adapter=adapter, base="tiny").model_dump_json())
        main(home.root, request, tmp_path / "result.json")
        found: dict[str, Any] = json.loads((tmp_path / "result.json").read_bytes())
        return found.get("problem", {})

    adapter = home.runs / "lora" / "sft" / "adapter"
    assert problem(adapter) == {}
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in spoil(load_file(path)).items()}, path)
    found = problem(adapter)
    assert found["code"] == "not_mergeable"
    assert re.search(why, found["message"]), found


def test_settings_that_peft_does_not_know_are_a_sentence(home: Home, tmp_path: Path) -> None:
    adapter = home.runs / "lora" / "sft" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": 7}))
    request = tmp_path / "request.json"
    request.write_text(GivenRequest(adapter=adapter, base="tiny").model_dump_json())
    main(home.root, request, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_bytes())["problem"]["code"] == "not_mergeable"
