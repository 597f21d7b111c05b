from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

from appliance.architecture import quantised_modules
from appliance.data.tokenizer import load_tokenizer
from appliance.errors import InvalidInput
from appliance.train.model import load_model, nf4_round_trip, stop_token_ids


def test_rounded_weights_compute_what_bitsandbytes_computes_in_training() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(96, 64) * 0.05, torch.randn(3, 5, 64, requires_grad=True)
    layer = bnb.nn.Linear4bit(
        64, 96, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
    )
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").train()
    rounded = nf4_round_trip(weight)
    assert torch.equal(layer(x), x @ rounded.T)
    assert 0.001 < float((rounded - weight).abs().max()) < 0.05
    assert rounded.unique().numel() <= 16 * weight.numel() // 64


def test_a_quantised_model_has_rounded_layers_and_nothing_else_changed(tiny_model: Path) -> None:
    plain, rounded = load_model(tiny_model), load_model(tiny_model, quantised=True)
    names = set(quantised_modules(plain))
    assert len(names) == 14
    assert "lm_head" not in names
    for (name, before), after in zip(plain.named_parameters(), rounded.parameters(), strict=True):
        if name.removesuffix(".weight") in names:
            assert torch.equal(after, nf4_round_trip(before))
        else:
            assert torch.equal(after, before)


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj"):
        load_model(folder)


def test_a_broken_weight_file_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(InvalidInput, match="no usable model"):
        load_model(folder)


def test_answers_end_at_the_models_the_tokenizers_and_the_templates_token(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert stop_token_ids(tokenizer, folder) == sorted([7, *ids])
    (folder / "generation_config.json").unlink()
    assert stop_token_ids(tokenizer, folder) == sorted(ids)
