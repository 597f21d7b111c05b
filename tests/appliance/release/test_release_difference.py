"""What leads from weights with one adapter in them to another adapter, against PEFT on the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from appliance.adapters import CONFIG, WEIGHTS
from appliance.errors import ApplianceError
from appliance.home import Home
from appliance.release.difference import read_factors, write_difference

TOKENS = torch.tensor([[5, 9, 31, 77, 12, 40]])


def logits(model: Path, adapter: Path | None = None) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        return torch.as_tensor(loaded.eval()(input_ids=TOKENS).logits)


def test_merged_weights_with_it_answer_as_the_newly_trained_adapter_does(home: Home, tmp_path: Path) -> None:
    base, live = home.models / "tiny", home.runs / "lora" / "merge" / "model"
    trained = home.runs / "dpo" / "dpo" / "adapter"
    write_difference(trained, live / "adapter", tmp_path / "unmerged", 32)
    wanted = logits(base, trained)
    assert torch.allclose(logits(live, tmp_path / "unmerged"), wanted, atol=1e-4)
    assert not torch.allclose(logits(live), wanted, atol=1e-2), "the two differ without it"


def test_on_the_base_it_is_the_adapter_itself(home: Home, tmp_path: Path) -> None:
    base, trained = home.models / "tiny", home.runs / "lora" / "sft" / "adapter"
    write_difference(trained, None, tmp_path / "unmerged", 32)
    assert torch.allclose(logits(base, tmp_path / "unmerged"), logits(base, trained), atol=1e-5)
    write_difference(trained, trained, tmp_path / "unmerged", 32)
    assert torch.allclose(logits(base, tmp_path / "unmerged"), logits(base), atol=1e-5), "a second time, over the first"


def changed(adapter: Path, **settings: Any) -> Path:
    config = json.loads((adapter / CONFIG).read_bytes())
    (adapter / CONFIG).write_text(json.dumps(config | settings))
    return adapter


def test_scales_and_ranks_of_single_modules_and_16_bits(home: Home, tmp_path: Path) -> None:
    adapter = home.runs / "lora" / "sft" / "adapter"
    tensors = load_file(adapter / WEIGHTS)
    module = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[module] = tensors[module][:2].clone()
    other = module.replace("lora_A", "lora_B")
    tensors[other] = tensors[other][:, :2].clone()
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, adapter / WEIGHTS)
    name = module.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    changed(adapter, use_rslora=True, rank_pattern={name: 2}, alpha_pattern={name: 3})
    write_difference(adapter, None, tmp_path / "unmerged", 32)
    base = home.models / "tiny"
    assert torch.allclose(logits(base, tmp_path / "unmerged"), logits(base, adapter), atol=1e-3)
    found = read_factors(adapter)[name]
    exact = tensors[other].bfloat16().float() * (3 / 2**0.5)
    assert np.allclose(found.left, exact.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("spoilt", "code"),
    [
        ({"use_dora": True}, "not_plain_lora"),
        ({"target_parameters": ["experts.down_proj"]}, "not_plain_lora"),
        ({"bias": "all"}, "not_mergeable"),
        ({"peft_type": "IA3"}, "not_mergeable"),
        ("tensor", "not_plain_lora"),
        ("cut", "not_mergeable"),
        ("half", "not_mergeable"),
        ("rank", "rank_too_large"),
    ],
)
def test_what_is_not_plain_low_rank_is_refused(home: Home, tmp_path: Path, spoilt: Any, code: str) -> None:
    adapter = home.runs / "lora" / "sft" / "adapter"
    tensors = load_file(adapter / WEIGHTS)
    if isinstance(spoilt, dict):
        changed(adapter, **spoilt)
    elif spoilt == "tensor":
        save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, adapter / WEIGHTS)
    elif spoilt == "cut":
        (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-8])
    elif spoilt == "half":
        save_file({name: tensor for name, tensor in tensors.items() if "lora_B" not in name}, adapter / WEIGHTS)
    with pytest.raises(ApplianceError) as caught:
        write_difference(adapter, None, tmp_path / "unmerged", 1 if spoilt == "rank" else 32)
    assert caught.value.code == code
    assert not (tmp_path / "unmerged").exists()
