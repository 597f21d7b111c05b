"""Frozen layers multiply in bf16 where that is fast, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import add_run, events, make_model, result, stage, work

from appliance.home import Home
from appliance.train import products, trial
from appliance.train.model import add_adapter, load_model
from appliance.train.products import RoundedLinear, are_fast, round_frozen
from appliance.train.recipe import Adapter
from appliance.train.simulation import meta_model

Warnings = list[str]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, exact_products: None) -> None:
    """A processor that multiplies bf16."""
    monkeypatch.setattr("appliance.train.products.are_fast", lambda: True)


def adapted(folder: Path) -> Any:
    model = add_adapter(load_model(folder), Adapter(), 3)
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return model


def rounded(model: Any) -> Warnings:
    said: Warnings = []
    round_frozen(model, lambda **fields: said.append(fields["message"]))
    return said


@pytest.mark.parametrize(
    ("capabilities", "on_gpu", "fast"),
    [
        ({"amx_bf16": True}, False, True),
        ({"amx_bf16": False, "avx512_bf16": True}, False, True),
        ({"amx_bf16": False, "avx512_f": True}, False, False),
        ({}, False, False),
        ({"amx_bf16": True}, True, False),
    ],
)
def test_it_is_for_processors_that_multiply_bf16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], on_gpu: bool, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(products, "ON_GPU", on_gpu)
    assert are_fast() is fast


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_what_bf16_makes_of_its_product(bias: bool) -> None:
    torch.manual_seed(1)
    exact = torch.nn.Linear(48, 32, bias=bias).requires_grad_(False)
    layer = torch.nn.Linear(48, 32, bias=bias).requires_grad_(False)
    layer.load_state_dict(exact.state_dict())
    products.hold_rounded([layer])
    values = torch.randn(2, 5, 48, requires_grad=True)
    given = layer(values)
    expected = (values.bfloat16() @ exact.weight.bfloat16().T).float() + (exact.bias if bias else 0)
    assert given.dtype == torch.float32
    assert torch.equal(given, expected)
    upstream = torch.randn_like(given)
    (gradient,) = torch.autograd.grad(given, values, upstream)
    assert torch.equal(gradient, (upstream.bfloat16() @ exact.weight.bfloat16()).float())
    assert layer.weight.dtype == torch.bfloat16


def test_adapters_head_and_norms_stay_in_fp32(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    assert rounded(model) == []
    kinds = {
        name: (type(module), module.weight.dtype)
        for name, module in model.named_modules()
        if hasattr(module, "weight") and not hasattr(module, "base_layer")
    }
    of_layers = {kind for name, kind in kinds.items() if name.endswith("base_layer")}
    assert of_layers == {(RoundedLinear, torch.bfloat16)}
    assert {dtype for name, (_, dtype) in kinds.items() if not name.endswith("base_layer")} == {torch.float32}
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)


def test_a_model_that_would_be_another_stays_as_it_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SAME_WITHIN", 1e-6)
    model = adapted(tiny_model)
    (said,) = rounded(model)
    assert said.startswith("products stay in fp32 instead of bf16: what it says would differ by 0.0")
    assert not any(isinstance(module, RoundedLinear) for module in model.modules())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_model_that_refuses_them_stays_as_it_is(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp")

    def refuse(module: Any, *_: Any) -> None:
        if isinstance(module.up_proj.base_layer, RoundedLinear):
            raise ValueError("not mine")

    layer.register_forward_pre_hook(refuse)
    (said,) = rounded(model)
    assert "the model refuses (ValueError: not mine" in said
    assert not any(isinstance(module, RoundedLinear) for module in model.modules())


def test_running_out_of_memory_is_no_refusal(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(RoundedLinear, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        rounded(adapted(tiny_model))


@pytest.mark.parametrize("kind", ["lora", "qlora", "dora"])
def test_a_run_learns_the_same(home: Home, monkeypatch: pytest.MonkeyPatch, exact_products: None, kind: str) -> None:
    losses = []
    for fast in (False, True):
        monkeypatch.setattr("appliance.train.products.are_fast", lambda fast=fast: fast)
        stages = stage("sft", "FACTS", epochs=4) + stage("dpo", "PREFERENCES", epochs=2)
        run = add_run(home, f"r-{fast}", stages, kind)
        assert work(run, "sft", "dpo") == 0
        assert not [event for event in events(run, "warning") if "bf16" in event["message"]]
        losses.append(torch.tensor([event["loss"] for event in events(run, "step") if event["stage"] == "sft"]))
        before = next(event["loss"] for event in events(run, "eval") if event["stage"] == "dpo")
        assert before == pytest.approx(math.log(2), abs=0.01), "the reference is what the stage begins with"
        adapter = load_file(run / "dpo" / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    exact, in_bf16 = losses
    assert not torch.equal(exact, in_bf16), "it was trained otherwise"
    assert torch.allclose(exact, in_bf16, rtol=0.05)


def test_what_was_trained_so_passes_its_gates(home: Home, fast: None) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", epochs=20))
    assert work(run, "sft", "merge", "verify") == 0
    gates = result(run, "verify")["gates"]
    assert all(gate["passed"] for gate in gates.values()), gates


def test_the_forecast_counts_them_in_two_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "tiny")
    counted = []
    for fast in (False, True):
        monkeypatch.setattr("appliance.train.products.are_fast", lambda fast=fast: fast)
        model = meta_model(base, Adapter())
        counted.append(sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad))
    layers = [module for module in model.modules() if isinstance(module, RoundedLinear)]
    assert counted[0] - counted[1] == 2 * sum(layer.weight.numel() for layer in layers) > 0
