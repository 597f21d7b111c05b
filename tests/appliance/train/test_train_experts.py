"""Mixtures of experts: adapters on the experts themselves, and experts that are stored in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import add_run, failure, losses, read_recipe, result, stage, work
from tiny_families import in_mxfp4, make_family

from appliance.adapters import CONFIG, WEIGHTS
from appliance.architecture import empty_model
from appliance.errors import InvalidInput
from appliance.home import Home
from appliance.models import require_trainable
from appliance.pull import require_usable
from appliance.release.conclude import finalise
from appliance.release.gates import Gate
from appliance.train.model import load_model, settle_router_loss, targeted_modules, targeted_parameters
from appliance.train.recipe import parse_recipe
from appliance.train.stage import forecast_of

ALL = 'target_parameters = ["all-experts"]\n'
SFT = stage("sft", "FACTS", epochs=2, max_length=4096)
DPO = stage("dpo", "PREFERENCES", epochs=1, max_length=4096)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_trained_merged_and_proven(home: Home, family: str) -> None:
    base = make_family(home.models / "experts", family)
    run = add_run(home, "r", ALL + SFT + DPO, base="experts")
    assert work(run, "sft", "dpo", "merge", "verify") == 0
    assert losses(run, "sft")[6] < losses(run, "sft")[1]
    assert {name: gate["passed"] for name, gate in result(run, "verify")["gates"].items()} == {
        **{"structure": True, "fidelity": True, "quality": True}
    }
    saved = load_file(run / "dpo" / "adapter" / WEIGHTS)
    assert all(tensor.any() for name, tensor in saved.items() if "experts" in name)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run / "merge" / "model"))
    of_experts = [name for name in before if ".experts." in name and "bias" not in name]
    assert of_experts
    assert all(not before[name].equal(after[name]) for name in of_experts)


def test_experts_of_named_layers_and_parameters_alone_are_trained(home: Home) -> None:
    make_family(home.models / "experts", "qwen3_moe")
    some = 'target_parameters = ["experts.down_proj"]\nlayers = [-1]\n'
    run = add_run(home, "r", some + SFT, base="experts")
    assert work(run, "sft") == 0
    names = load_file(run / "sft" / "adapter" / WEIGHTS)
    assert {name.partition(".experts.")[0] for name in names if "experts" in name} == {
        "base_model.model.model.layers.1.mlp"
    }
    config = json.loads((run / "sft" / "adapter" / CONFIG).read_bytes())
    assert config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("base", "settings", "said"),
    [
        ("tiny", ALL, "the base model has no parameter with a matrix for each of several experts"),
        ("experts", 'target_parameters = ["w1"]\n', "the adapter's target 'w1' matches no parameter of experts"),
    ],
)
def test_what_is_no_parameter_of_experts_is_refused(home: Home, base: str, settings: str, said: str) -> None:
    make_family(home.models / "experts", "qwen3_moe")
    run = add_run(home, "r", settings + SFT, base=base)
    assert work(run, "sft") != 0
    assert failure(run, "sft")["reason"] == said


def test_experts_that_are_made_over_when_they_are_loaded_are_refused_before_training(home: Home) -> None:
    make_family(home.models / "experts", "qwen3_vl_moe")
    run = add_run(home, "r", ALL + SFT, base="experts")
    assert work(run, "sft") != 0
    assert failure(run, "sft")["code"] == "not_mergeable"
    assert "experts" in failure(run, "sft")["reason"]
    assert not losses(run, "sft")


@pytest.mark.parametrize("other", ['kind = "dora"', "dropout = 0.1"])
def test_experts_take_no_dora_and_no_dropout(other: str) -> None:
    text = f'name = "r"\nbase = "b"\n[adapter]\n{other}\n{ALL}{SFT.replace("FACTS", repr("facts"))}'
    with pytest.raises(InvalidInput, match="experts take no"):
        parse_recipe(text)


def test_experts_in_mxfp4_stay_as_they_are_and_the_release_says_so(home: Home) -> None:
    base = in_mxfp4(make_family(home.models / "mxfp4", "gpt_oss"))
    require_usable(base)
    run = add_run(home, "r", SFT + DPO, base="mxfp4")
    assert work(run, "sft", "dpo", "merge", "verify") == 0
    assert losses(run, "sft")[6] < losses(run, "sft")[1]
    assert all(gate["passed"] for gate in result(run, "verify")["gates"].values())
    assert "MXFP4" in result(run, "merge")["trained_on"]
    passed = {name: Gate(True, {}, "") for name in ("parity", "stopping")}
    manifest = finalise(home, "r", read_recipe(run), passed)
    assert manifest.merge["trained_on"] == result(run, "merge")["trained_on"]
    card = (home.releases / "r" / "README.md").read_text()
    assert "experts of the base are in MXFP4, and so they are here" in card
    before, after = (load_file(folder / "model.safetensors") for folder in (base, home.releases / "r"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {name.rpartition(".self_attn.")[2] for name in changed} == {f"{x}_proj.weight" for x in "qkvo"}
    assert json.loads((home.releases / "r" / "config.json").read_bytes())["quantization_config"]


def test_experts_in_mxfp4_are_not_trained_themselves_nor_turned_into_nf4(home: Home) -> None:
    base = in_mxfp4(make_family(home.models / "mxfp4", "gpt_oss"))
    run = add_run(home, "r", ALL + SFT, base="mxfp4")
    assert work(run, "sft") != 0
    assert failure(run, "sft")["code"] == "not_mergeable"
    require_trainable(base)
    with pytest.raises(InvalidInput, match=r'in MXFP4, .* say kind = "lora"'):
        require_trainable(base, quantised=True)
    with pytest.raises(InvalidInput, match=r"in MXFP4, into which no adapter .* take target_parameters out"):
        require_trainable(base, experts=True)


@pytest.mark.parametrize(("family", "coefficient"), [("doge", 0.0), ("llama4_text", 0.0), ("gpt_oss", 0.9)])
def test_a_loss_of_routers_is_asked_of_models_that_give_one(tmp_path: Path, family: str, coefficient: float) -> None:
    model = load_model(make_family(tmp_path / "base", family, router_aux_loss_coef=0.9))
    settle_router_loss(model)
    assert model.config.router_aux_loss_coef == coefficient
    assert family != "gpt_oss" or model.config.num_experts == 4


@pytest.mark.parametrize("family", ["doge", "llama4_text"])
def test_models_without_one_and_those_whose_layers_are_elsewhere_are_trained(home: Home, family: str) -> None:
    make_family(home.models / "base", family)
    run = add_run(home, "r", stage("sft", "FACTS", max_steps=2, max_length=4096), base="base")
    assert work(run, "sft") == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_experts_have_a_forecast(home: Home, family: str) -> None:
    make_family(home.models / "base", family)
    forecasts = []
    for name, settings in (("beside", ""), ("experts", ALL)):
        run = add_run(home, name, settings + SFT, base="base")
        forecasts.append(forecast_of(home, read_recipe(run), "sft").event()["memory"])
    assert forecasts[1]["adapter"] > forecasts[0]["adapter"]


def test_a_layer_with_targets_of_one_kind_alone_is_a_layer(home: Home) -> None:
    """The first layer of DeepSeek V3 is dense."""
    model = empty_model(make_family(home.models / "base", "deepseek_v3"))
    assert targeted_modules(model, ("all-linear",), (0,))
    assert targeted_parameters(model, ("all-experts",), (0,)) == set()
    of_last = targeted_parameters(model, ("all-experts",), (-1,))
    assert of_last == targeted_parameters(model, ("all-experts",), (0, 1))
    assert {name.split(".")[2] for name in of_last} == {"1"}
    with pytest.raises(InvalidInput, match=r"layer 2 is none .* from 0 to 1"):
        targeted_parameters(model, ("all-experts",), (2,))


def test_layers_without_any_target_and_no_targets_at_all_are_refused(home: Home) -> None:
    make_family(home.models / "base", "deepseek_v3")
    run = add_run(home, "r", "targets = []\nlayers = [0]\n" + ALL + SFT, base="base")
    assert work(run, "sft") != 0
    assert failure(run, "sft")["reason"] == "the adapter's layers have none of its targets"
    with pytest.raises(InvalidInput, match="an adapter without targets trains nothing"):
        add_run(home, "s", "targets = []\n" + SFT, base="base")
