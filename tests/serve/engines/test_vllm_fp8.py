"""What vLLM makes of a model in FP8 is what the gates take it for, as far as its CPU build can show."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from appliance.release.fp8 import round_to_fp8
from appliance.release.verify import TIMES_FP8
from appliance.train.model import load_model
from serve.engines.vllm import IN_FP8

pytestmark = pytest.mark.slow


def weakened(base: Path, folder: Path) -> Path:
    """A copy of the model whose layers add less."""
    shutil.copytree(base, folder, copy_function=shutil.copy)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(0.6)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logps(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """Of every token but the first of each."""
    said = []
    for one in ids:
        with torch.no_grad():
            of = torch.log_softmax(model(torch.tensor([one])).logits[0, :-1].float(), -1)
        said.append(of.gather(1, torch.tensor(one[1:])[:, None])[:, 0])
    return torch.cat(said)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


def test_vllm_rounds_as_the_gates_do_when_it_starts_and_when_it_reloads(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's CPU build multiplies in FP8 on processors with AMX only")
    text = Path(__file__).read_text()
    ids = AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]
    prompts = [ids[start : start + 200] for start in range(0, 600, 200)]
    models = [smollm2, weakened(smollm2, tmp_path / "weakened")]
    options = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(IN_FP8[::2], IN_FP8[1::2], strict=True)
    }
    options["quantization_config"] = json.loads(options["quantization_config"])
    asked = {"model": str(models[0]), "reloaded": str(models[1]), "options": options, "ids": prompts}
    (tmp_path / "asked").write_text(json.dumps(asked))
    script = Path(__file__).with_name("fp8_on_a_cpu.py")
    subprocess.run([sys.executable, script, tmp_path / "asked", tmp_path / "said"], check=True)
    said = json.loads((tmp_path / "said").read_text())
    found = [torch.tensor([logp for one in each for logp in one[1:]]) for each in said]
    for model, engine, other in zip(models, found, found[::-1], strict=True):
        adapter, rounded = logps(load_model(model), prompts), load_model(model)
        round_to_fp8(rounded, inputs=False)
        noise = apart(adapter, logps(rounded, prompts))
        assert 0.8 * noise < apart(adapter, engine) < TIMES_FP8 * noise
        assert apart(adapter, other) > 2 * noise
