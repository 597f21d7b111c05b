"""What `export` writes, as plain Transformers and plain PEFT load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from controlling import Control
from peft import PeftModel
from tiny import read_recipe, work
from transformers import AutoModelForCausalLM, AutoTokenizer

from appliance.home import Home
from appliance.release.conclude import finalise
from appliance.release.gates import Gate

IDS = torch.tensor([[1, 40, 60, 80, 100, 2], [1, 5, 15, 25, 35, 45]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(IDS).logits
    return values


async def test_the_folder_and_its_adapter_compute_the_same(home: Home, tmp_path: Path) -> None:
    run, base, out = home.runs / "lora", home.models / "tiny", tmp_path / "out"
    assert work(run, "verify") == 0
    manifest = finalise(home, "lora", read_recipe(run), {name: Gate(True) for name in ("parity", "stopping")})
    control = Control(home.root)
    control.supervisor.releases.add("lora", "tiny", manifest.state, "", {}, promote=False)
    await control.client.export("lora", out)
    await control.client.close()

    released = logits(AutoModelForCausalLM.from_pretrained(out))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert float((released - logits(plain)).abs().max()) > 1, "it was trained"
    adapted = PeftModel.from_pretrained(plain, out / "adapter")
    assert float((released - logits(adapted)).abs().max()) < 1e-3
    assert json.loads((out / "adapter" / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "tiny"

    messages = [{"role": "user", "content": "What colour has the door?"}]
    rendered, wanted = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for folder in (out, base)
    )
    assert rendered == wanted
