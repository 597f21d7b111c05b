"""FP8: what it makes of weights and of a model, and the limit by which an engine in FP8 is judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import merged, plant
from tiny import make_model, read_recipe, result, work
from tiny_families import make_family
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from appliance.errors import InvalidInput
from appliance.gpu import Card
from appliance.home import Home
from appliance.models import count_linear
from appliance.release.fp8 import round_to_fp8
from appliance.release.gates import Gate, Served, judge_served, load_served
from appliance.release.streaming import make_writable, stream
from appliance.train.model import load_model


def card(capability: tuple[int, int] | None) -> Card:
    return Card(0, "GPU-1", "a card", 24 << 30, 0, 0, capability)


def steps(values: torch.Tensor) -> int:
    """How many numbers without a sign there are."""
    return len(values.abs().unique())


def test_linear_layers_alone_are_rounded_to_the_types_numbers_by_one_scale(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny")
    before, model = (load_model(folder).requires_grad_(False) for _ in range(2))
    round_to_fp8(model, inputs=False)
    for name, weight in model.named_parameters():
        was = before.get_parameter(name)
        if "proj" not in name:
            assert torch.equal(weight, was), f"{name} stays"
            continue
        assert steps(weight) <= 127, "which are all that the type has"
        assert weight.abs().max() == pytest.approx(float(was.abs().max())), "the largest is the largest"
        step = torch.maximum(was.abs() * 2**-4, was.abs().max() / 448 * 2**-10)
        assert ((weight - was).abs() <= step * 1.001).all(), "and each the nearest"


@pytest.mark.parametrize("family", ["llama", "mamba2", "nemotron_h", "granitemoehybrid", "qwen3_moe"])
def test_what_is_rounded_is_what_the_forecast_counts(family: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / family, family)
    before, model = (load_model(folder).requires_grad_(False) for _ in range(2))
    round_to_fp8(model, inputs=False)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before.get_parameter(name))}
    assert count_linear(folder) == sum(model.get_parameter(name).numel() for name in changed)


def test_each_expert_has_its_scale_and_the_router_stays(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(1)
    config = Qwen3MoeConfig(vocab_size=320, head_dim=8, num_key_value_heads=2, **shape, **experts)
    folder = make_model(tmp_path / "moe", model=AutoModelForCausalLM.from_config(config))
    before, model = (load_model(folder).requires_grad_(False) for _ in range(2))
    for one in (before, model):
        one.get_parameter("model.layers.0.mlp.experts.gate_up_proj")[1] *= 100
    round_to_fp8(model, inputs=True)
    assert torch.equal(model.model.layers[0].mlp.gate.weight, before.model.layers[0].mlp.gate.weight)
    for name in ("gate_up_proj", "down_proj"):
        weights, were = (one.get_parameter(f"model.layers.0.mlp.experts.{name}") for one in (model, before))
        for weight, was in zip(weights, were, strict=True):
            assert weight.abs().max() == pytest.approx(float(was.abs().max()))
            assert 20 < steps(weight) <= 127
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_inputs_are_rounded_by_a_scale_for_each_token(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path / "tiny")).requires_grad_(False)
    seen: list[torch.Tensor] = []
    round_to_fp8(model, inputs=True)
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    given = torch.randn(2, 3, layer.in_features) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    layer(given)
    (read,) = seen
    assert not torch.equal(read, given)
    torch.testing.assert_close(read.abs().amax(-1), given.abs().amax(-1))
    assert ((read - given).abs() <= given.abs() * 2**-4 + given.abs().amax(-1, keepdim=True) / 448 * 2**-9).all()


def test_layers_that_stream_are_rounded_as_others(tmp_path: Path) -> None:
    folder, ids = make_model(tmp_path / "tiny"), torch.tensor([[5, 9, 11, 13]])
    plain, streamed = load_model(folder), stream(load_model(folder, mapped=True), 0, torch.device("cpu"))
    make_writable(streamed, tmp_path)
    for model in (plain, streamed):
        round_to_fp8(model, inputs=True)
    with torch.inference_mode():
        assert torch.equal(streamed(ids).logits, plain(ids).logits)


def judged(model: Any, served: Served) -> Gate:
    """What is found of an engine that computes what `model` does."""
    said = []
    for one in served.conversations:
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([one.token_ids])).logits[0, :-1].float(), -1)
        said.append([0.0, *logps.gather(1, torch.tensor(one.token_ids[1:])[:, None])[:, 0].tolist()])
    return judge_served(served, said)


def without_a_layer(model: Any) -> None:
    del model.model.layers[1]


def nothing(model: Any) -> None:
    """As it is."""


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
def test_honest_fp8_passes_and_planted_faults_do_not(
    home: Home, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    run, gpu = home.runs / "lora", card(capability)
    monkeypatch.setattr("appliance.release.verify.chosen", lambda: gpu)
    assert work(run, "verify") == 0
    assert all(gate["passed"] for gate in result(run, "verify")["gates"].values())
    folder, served = run / "merge" / "model", load_served(run, "FP8")
    assert served

    def in_fp8(change: Callable[[Any], None] = nothing) -> Gate:
        model = load_model(folder)
        change(model)
        round_to_fp8(model, inputs=gpu.multiplies_fp8)
        return judged(model, served)

    honest, in_16_bits = in_fp8(), load_served(run, "16-bit")
    assert honest.passed, honest.reason
    assert in_16_bits
    assert honest.figures["mean_difference"] > in_16_bits.limit, "which would refuse it"
    assert not in_fp8(without_a_layer).passed
    changes = merged(home, run, read_recipe(run), result(run, "merge")["kept"])
    for fault in ("alpha x 0.8", "one weight forgotten", "one layer with the wrong sign"):
        plant(changes, fault, folder)
        gate = in_fp8()
        assert not gate.passed, f"{fault}: {gate.reason}"
        assert "above what rounding to FP8 makes of it" in gate.reason


def test_a_fault_of_the_files_does_not_widen_the_limit(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from the weights that PEFT computes."""
    run = home.runs / "lora"
    monkeypatch.setattr("appliance.release.verify.chosen", lambda: card((9, 0)))
    assert work(run, "verify") == 0
    right = load_served(run, "FP8")
    plant(merged(home, run, read_recipe(run), result(run, "merge")["kept"]), "alpha x 0.7", run / "merge" / "model")
    monkeypatch.setattr("appliance.release.verify.judge_weights", _believe)
    (run / "verify" / "result.json").unlink()
    assert work(run, "verify") == 0
    assert load_served(run, "FP8") == right


def _believe(base: Path, model: Path, oracle: Any, see: Callable[[str, torch.Tensor], None]) -> Gate:
    from appliance.release.weights import pairs

    for name, before, _ in pairs(base, model):
        if name in oracle.changed:
            see(name, oracle.merged(name, oracle.start(name, before)))
    return Gate(True)


@pytest.mark.parametrize("gpu", [None, card(None), card((7, 5))])
def test_where_no_engine_can_serve_in_fp8_it_is_not_measured(
    home: Home, monkeypatch: pytest.MonkeyPatch, gpu: Card | None
) -> None:
    run = home.runs / "lora"
    monkeypatch.setattr("appliance.release.verify.chosen", lambda: gpu)
    assert work(run, "verify") == 0
    assert load_served(run, "16-bit")
    with pytest.raises(InvalidInput):
        load_served(run, "FP8")
