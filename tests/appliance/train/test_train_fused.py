"""Fused layers give what the layers give that they replace, and learn the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny_families import make_family
from torch.autograd.graph import saved_tensors_hooks

from appliance.train import fused, trial
from appliance.train.model import add_adapter, load_model
from appliance.train.products import hold_rounded
from appliance.train.recipe import Adapter

IDS = torch.arange(48).view(2, 24) % 300


def adapted(folder: Path, **adapter: Any) -> Any:
    """A model with an adapter that changes something, for sums in fp32."""
    model = add_adapter(load_model(folder), Adapter(**adapter), 3)
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()


def made_of(model: Any) -> list[torch.Tensor]:
    """What `model` gives, and the gradients of what is trained."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    logits = model(input_ids=IDS).logits
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), trained)]


def is_fused(model: Any) -> set[str]:
    """Kinds of the layers that are computed in another way."""
    return {type(layer).__name__ for layer in model.modules() if "forward" in vars(layer)}


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], rel: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).norm()) <= rel * float(other.norm())


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_an_adapter_gives_and_learns_what_pefts_does(tiny_model: Path, kind: str) -> None:
    model = adapted(tiny_model, kind=kind, rank=4, alpha=12)
    wanted = made_of(model)
    fused.fuse_adapters(model)
    assert is_fused(model) == {"Linear"}
    assert_same(made_of(model), wanted)


def test_a_bias_stays(tmp_path: Path) -> None:
    model = adapted(make_family(tmp_path / "qwen2", "qwen2"), kind="lora")
    biases = [weight for name, weight in model.named_parameters() if name.endswith("q_proj.base_layer.bias")]
    assert biases
    with torch.no_grad():
        for bias in biases:
            bias.normal_()
    wanted = made_of(model)
    fused.fuse_adapters(model)
    assert_same(made_of(model), wanted)


def test_products_in_bf16_stay_so(tiny_model: Path) -> None:
    model = adapted(tiny_model, kind="lora")
    hold_rounded([layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")])
    wanted = made_of(model)
    fused.fuse_adapters(model)
    assert is_fused(model) == {"Linear"}
    assert_same(made_of(model), wanted, rel=1e-2)


def test_of_weights_in_four_bits_the_gradient_is_that_of_their_values() -> None:
    torch.manual_seed(1)
    layer = Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    values = torch.randn(2, 3, 64, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(values).square().sum(), values)
    nothing = torch.zeros(4, 64), torch.zeros(32, 4)
    (found,) = torch.autograd.grad(fused._Adapted.apply(values, *nothing, 1.0, layer).square().sum(), values)
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert fused._weight(layer).shape == (32, 64)


@pytest.mark.parametrize("adapter", [{"kind": "dora"}, {"kind": "lora", "dropout": 0.1}])
def test_an_adapter_of_another_kind_stays_pefts(tiny_model: Path, adapter: dict[str, Any]) -> None:
    model = adapted(tiny_model, **adapter)
    fused.fuse_adapters(model)
    assert is_fused(model) == set()


def test_a_model_without_its_adapter_is_the_base(tiny_model: Path) -> None:
    model = adapted(tiny_model, kind="lora")
    fused.fuse_adapters(model)
    with_it = model(input_ids=IDS).logits
    with model.disable_adapter():
        without = model(input_ids=IDS).logits
    assert torch.equal(without, load_model(tiny_model)(input_ids=IDS).logits)
    assert not torch.allclose(with_it, without)


def test_the_adapter_that_is_active_counts(tiny_model: Path) -> None:
    model = adapted(tiny_model, kind="lora")
    fused.fuse_adapters(model)
    first = made_of(model)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert torch.allclose(model(input_ids=IDS).logits, load_model(tiny_model)(input_ids=IDS).logits, atol=1e-5)
    model.set_adapter("default")
    assert_same(made_of(model), first)


def test_under_autocast_it_keeps_no_copy_in_fp32(tiny_model: Path) -> None:
    model = adapted(tiny_model, kind="lora")
    fused.fuse_adapters(model)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    kept: list[torch.dtype] = []
    values = torch.randn(2, 5, layer.in_features, requires_grad=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        saved_tensors_hooks(lambda tensor: kept.append(tensor.dtype) or tensor, lambda tensor: tensor),
    ):
        found = layer(values)
    assert found.dtype == torch.bfloat16
    assert set(kept) == {torch.bfloat16}
    found.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


FAMILIES = {
    "llama": {"LlamaRMSNorm", "LlamaMLP"},
    "mistral": {"MistralRMSNorm", "MistralMLP"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP"},
    "gemma2": {"Gemma2RMSNorm", "Gemma2MLP"},
    "gemma3_text": {"Gemma3RMSNorm", "Gemma3MLP"},
    "olmo2": {"Olmo2RMSNorm", "Olmo2MLP"},
    "phi3": {"Phi3RMSNorm"},
    "gpt2": set(),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_mlps_give_and_pass_on_what_their_publishers_do(tmp_path: Path, family: str) -> None:
    model = adapted(make_family(tmp_path / family, family), kind="lora")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    wanted = made_of(model)
    changed = fused.fuse_layers(model)
    assert {type(layer).__name__ for layer in changed} == FAMILIES[family]
    assert_same(made_of(model), wanted, rel=1e-4)


class Norm(torch.nn.Module):
    """A norm whose result is `times` the usual one, with an epsilon that it may not have told."""

    def __init__(self, times: float, epsilon: float) -> None:
        super().__init__()
        self.variance_epsilon, self.times, self.epsilon = 1e-6, times, epsilon
        self.weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        size = torch.rsqrt(values.square().mean(-1, keepdim=True) + self.epsilon)
        return self.times * values * size * self.weight


class Mlp(torch.nn.Module):
    """An MLP that activates `activated` of its projections."""

    def __init__(self, activated: str) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, torch.nn.Linear(8, 8))
        self.act_fn, self.activated = torch.nn.SiLU(), activated

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        both = {"gate_proj": self.gate_proj(values), "up_proj": self.up_proj(values)}
        both[self.activated] = self.act_fn(both[self.activated])
        found: torch.Tensor = self.down_proj(both["gate_proj"] * both["up_proj"])
        return found


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (Norm(1, 1e-6), True),
        (Norm(2, 1e-6), False),
        (Norm(1, 1e-5), False),
        (Mlp("gate_proj"), True),
        (Mlp("up_proj"), False),
    ],
)
def test_a_layer_is_known_by_what_it_computes(layer: torch.nn.Module, known: bool) -> None:
    assert bool(fused.fuse_layers(torch.nn.ModuleList([layer]))) is known


def test_each_layer_is_tried_for_itself() -> None:
    layers = torch.nn.ModuleList([Norm(1, 1e-6), Norm(1, 1e-5), Norm(1, 1e-2), Mlp("gate_proj"), Mlp("up_proj")])
    layers[2].variance_epsilon = 1e-2
    values = torch.arange(8.0)[None] * 1e-3
    wanted = layers[2](values)
    assert fused.fuse_layers(layers) == [layers[0], layers[2], layers[3]]
    assert torch.allclose(layers[2](values), wanted)


def test_a_norm_that_is_trained_is_left_alone() -> None:
    layer = Norm(1, 1e-6)
    layer.weight.requires_grad_()
    assert fused.fuse_layers(torch.nn.ModuleList([layer])) == []


def test_they_keep_less_than_their_publishers(tiny_model: Path) -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            made = model.base_model(input_ids=IDS).logits
        del made
        return sum(sizes.values())

    model = adapted(tiny_model, kind="lora").to(torch.bfloat16)
    fused.fuse_adapters(model)
    before = kept(model)
    fused.fuse_layers(model)
    assert kept(model) < 0.85 * before


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ON_GPU", True)


def test_without_a_gpu_norms_and_mlps_stay(tiny_model: Path) -> None:
    model = adapted(tiny_model, kind="lora")
    fused.fuse(model, pytest.fail)
    assert is_fused(model) == {"Linear"}


def test_with_one_they_are_fused_after_a_trial(tiny_model: Path, on_gpu: None) -> None:
    model = adapted(tiny_model, kind="lora")
    fused.fuse(model, pytest.fail)
    assert is_fused(model) == {"Linear", "LlamaRMSNorm", "LlamaMLP"}


def test_a_model_that_would_be_another_keeps_them(
    tiny_model: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(fused, "_norm", lambda values, *_: 2 * values)
    monkeypatch.setattr(fused, "_computes", lambda *_, **__: True)
    model = adapted(tiny_model, kind="lora")
    before = trial.said(model)
    fused.fuse(model, lambda **fields: said.append(fields["message"]))
    assert said[0].startswith("norms and MLPs are computed as the model's publisher wrote them: what it says would")
    assert is_fused(model) == {"Linear"}
    assert_same(list(trial.said(model)), list(before))


def test_a_model_that_cannot_be_tried_keeps_them(
    tiny_model: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> trial.Said:
        raise ValueError("not like this")

    said: list[str] = []
    monkeypatch.setattr(trial, "said", refuse)
    model = adapted(tiny_model, kind="lora")
    fused.fuse(model, lambda **fields: said.append(fields["message"]))
    assert said[0].endswith("the model refuses (ValueError: not like this)")
    assert is_fused(model) == {"Linear"}
