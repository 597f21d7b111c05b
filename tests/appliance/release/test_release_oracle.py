"""Gate 1 on every kind of adapter that can be merged, in every type of weight."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_release_adapter import MERGEABLE, adapt, bases

from appliance.adapters import WEIGHTS
from appliance.release.adapter import read_changes
from appliance.release.oracle import Oracle
from appliance.release.structure import judge_weights
from appliance.release.weights import write_weights

__all__ = ["bases"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", MERGEABLE)
def test_an_honest_merge_passes_and_one_of_another_adapter_does_not(
    bases: Path, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    kind, settings = MERGEABLE[case]
    base = tmp_path / "base"
    shutil.copytree(bases / kind, base)
    for path in base.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    adapter = adapt(base, tmp_path / "adapter", **settings)
    merged = tmp_path / "merged"
    shutil.copytree(base, merged, ignore=shutil.ignore_patterns("*.safetensors"))
    write_weights(base, merged, read_changes(adapter, base))
    gate = judge_weights(base, merged, Oracle(adapter, base, rounded=False), lambda *_: None)
    assert gate.passed, gate
    tensors = load_file(adapter / WEIGHTS)
    for name in sorted(tensors):
        if name.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        other = {**tensors, name: tensors[name] * 1.25}
        save_file(other, adapter / WEIGHTS, metadata={"format": "pt"})
        gate = judge_weights(base, merged, Oracle(adapter, base, rounded=False), lambda *_: None)
        assert not gate.passed, name
