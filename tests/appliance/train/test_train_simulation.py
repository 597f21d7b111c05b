"""The pass without numbers, against a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from appliance.train import simulation
from appliance.train.fused import fuse_adapters
from appliance.train.model import add_adapter, load_model
from appliance.train.recipe import Adapter
from appliance.train.simulation import meta_model, simulate

ADAPTER = Adapter(kind="lora", rank=4)
IN_PLACE = {torch.ops.aten.addmm_: lambda _, one, other, **__: 2 * one[0] * one[1] * other[1]}
"""How torch counts what it leaves out."""


def fused(folder: Path) -> Any:
    """The real model, with its layers as they are trained."""
    model = add_adapter(load_model(folder), ADAPTER, 3).train()
    fuse_adapters(model)
    return model


def real_pass(model: Any, rows: int, width: int) -> tuple[int, int]:
    """Bytes that a real forward pass keeps for its backward pass, and operations of both but attention's."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    tokens = torch.zeros(rows, width, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.get_base_model().base_model(input_ids=tokens, use_cache=False).last_hidden_state
        hidden.sum().backward()
    return sum(kept.values()), sum(counter.get_flop_counts()["Global"].values())


def test_memory_and_operations_are_those_of_a_real_pass(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_ATTEND", None)
    model = fused(tiny_model)
    kept, operations = real_pass(model, 1, 96)
    monkeypatch.undo()
    found = simulate(meta_model(tiny_model, ADAPTER), 1, 96, 96)
    assert kept < found.activations < 1.5 * kept, "what is kept, and what the backward pass needs for a moment"
    vocabulary = 4 * 96 * 320 * 64
    attention = 14 * 2 * 4 * 96**2 // 2 * 16
    assert found.operations == pytest.approx(operations + vocabulary + attention, rel=0.02)


def test_it_grows_with_tokens_and_with_the_adapter(tiny_model: Path) -> None:
    model = meta_model(tiny_model, ADAPTER)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    short, long, wide = (simulate(model, *size) for size in ((1, 64, 64), (1, 128, 128), (2, 64, 128)))
    assert long.activations == pytest.approx(2 * short.activations, rel=0.05)
    assert wide.activations == pytest.approx(2 * short.activations, rel=0.05)
    assert long.operations > 2 * short.operations
    assert simulate(model, 1, 64, 64) == short, "a pass leaves nothing behind"
    more = simulate(meta_model(tiny_model, Adapter(kind="lora", rank=32)), 1, 64, 64)
    assert more.activations > short.activations


def test_gradients_are_not_counted_among_activations(tiny_model: Path) -> None:
    model = meta_model(tiny_model, Adapter(kind="lora", rank=64))
    gradients = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert simulate(model, 1, 4, 4).activations < gradients / 4


def test_logits_are_those_of_the_trained_tokens(tiny_model: Path) -> None:
    model = meta_model(tiny_model, ADAPTER)
    few, many = simulate(model, 1, 128, 16), simulate(model, 1, 128, 128)
    assert (few.activations, few.forward, few.backward) == (many.activations, many.forward, many.backward)
    assert many.head == 8 * few.head == 4 * 128 * 320 * 64
    assert few.logits < many.logits


def test_with_checkpointing_it_holds_less_and_computes_the_layers_once_more(tiny_model: Path) -> None:
    kept, again = (meta_model(tiny_model, ADAPTER, every_n_layers=every) for every in (0, 1))
    usual, less = (simulate(model, 1, 256, 16) for model in (kept, again))
    layer = simulate(meta_model(tiny_model, ADAPTER), 1, 256, 16).activations / 2
    assert layer / 2 < less.activations < 0.75 * usual.activations, "one of two layers at a time"
    assert less.forward == usual.forward
    assert less.backward == pytest.approx(usual.backward + usual.forward, rel=0.05)
    assert simulate(again, 1, 256, 16) == less, "a pass leaves nothing behind"


def test_real_layers_that_are_computed_twice_keep_what_the_simulation_says(tiny_model: Path) -> None:
    model = fused(tiny_model)
    usual, _ = real_pass(model, 1, 96)
    model.gradient_checkpointing_enable()
    kept, _ = real_pass(model, 1, 96)
    layer = usual / 2
    found = simulate(meta_model(tiny_model, ADAPTER, every_n_layers=1), 1, 96, 96)
    assert kept < 0.2 * usual
    assert 0.8 * (kept + layer) < found.activations < 1.5 * (kept + layer)


MEASURED = json.loads((Path(__file__).parents[3] / "bench" / "results" / "gpu.json").read_text())["figures"]
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LONGEST = 1271
"""Tokens of the longest row of the self-test's sft parts."""


@pytest.mark.slow
@pytest.mark.parametrize(("part", "every_n_layers"), [("sft", 0), ("sft_checkpointed", 1)])
def test_on_a_gpu_it_holds_what_an_h100_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, every_n_layers: int
) -> None:
    """Of 8 billion parameters in NF4 under autocast, within the tenth that the forecast may be wrong by."""
    monkeypatch.setattr(simulation, "DTYPE", torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    model = meta_model(tmp_path, Adapter(kind="qlora", rank=16), every_n_layers=every_n_layers)
    taken = simulate(model, 1, LONGEST, LONGEST)
    fixed = sum(MEASURED[part]["forecast_parts"][name] for name in ("weights", "adapter", "gradients", "optimiser"))
    assert fixed + taken.activations + taken.logits == pytest.approx(MEASURED[part]["peak"], rel=0.05)


LAYERS = json.loads((Path(__file__).parents[3] / "bench" / "results" / "gpu_layers.json").read_text())["passes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "keep_less"), [("publishers' layers, NF4", False), ("Liger's norms, rotations and MLPs, NF4", True)]
)
@pytest.mark.parametrize("case", ["full", "wide"])
def test_layers_that_keep_less_hold_what_they_did_on_an_h200(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str, keep_less: bool, case: str
) -> None:
    """Liger's keep the tensors that ours keep."""
    monkeypatch.setattr(simulation, "DTYPE", torch.bfloat16)
    monkeypatch.setattr(simulation, "ON_GPU", keep_less)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    measured = LAYERS[layers][case]
    trained = round(0.875 * measured["tokens"])
    taken = simulate(meta_model(tmp_path, Adapter(kind="qlora", rank=16)), 1, measured["tokens"], trained)
    fixed = sum(MEASURED["sft"]["forecast_parts"][name] for name in ("weights", "adapter", "gradients"))
    assert (fixed + taken.activations + taken.logits) / 2**30 == pytest.approx(measured["peak_gib"], rel=0.02)
