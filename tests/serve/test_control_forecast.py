"""A recipe's forecast through the control API, as `appliance train --dry-run` asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import CHATML, make_tokenizer
from controlling import Control
from safetensors.numpy import save_file

from appliance.errors import InvalidInput, NotFound
from appliance.sources import find_sources

RECIPE = """
name = "r"
base = "tiny"
[[stages]]
method = "sft"
dataset = "one"
epochs = 2
[[stages]]
method = "{second}"
name = "again"
dataset = "one"
"""
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.slow
async def test_each_stage_is_forecast_and_nothing_is_queued(control: Control, tmp_path: Path) -> None:
    base = control.home.models / "tiny"
    make_tokenizer(CHATML).save_pretrained(base)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, **SHAPE}
    (base / "config.json").write_text(json.dumps(config))
    save_file({}, base / "model.safetensors")
    with pytest.raises(NotFound):
        await control.client.forecast(RECIPE.format(second="sft"))
    file = tmp_path / "one.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": f"Say {n}", "output": f"I say {n}"}) for n in range(20)))
    await control.client.import_dataset(find_sources([str(file)]), "one")

    first, again = await control.client.forecast(RECIPE.format(second="sft"))
    assert (first["stage"], first["steps"], first["fits"], first["advice"]) == ("sft", 6, True, "")
    assert again["steps"] == 9
    assert first["memory"]["total"] == sum(size for part, size in first["memory"].items() if part != "total")
    with pytest.raises(InvalidInput, match="dpo trains on preference rows"):
        await control.client.forecast(RECIPE.format(second="dpo"))
    assert await control.client.runs() == []
    assert list(control.home.incoming.iterdir()) == []
