"""Whether a run's model thinks before it answers: as its recipe says, or as its rows do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, PUBLISHED, make_tokenizer
from controlling import Control
from safetensors.numpy import save_file

from appliance.sources import find_sources
from appliance.train.recipe import parse_recipe
from serve.control.submission import _thinking

RECIPE = 'name = "r"\nbase = "tiny"\n{thinking}\n[[stages]]\nmethod = "sft"\ndataset = "{dataset}"\n'
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SWITCHED = (PUBLISHED / "qwen3.jinja").read_text()


def add_base(control: Control, template: str) -> None:
    folder = control.home.models / "tiny"
    make_tokenizer(template).save_pretrained(folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, **SHAPE}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")


async def import_rows(control: Control, folder: Path, name: str, thought: str) -> None:
    rows = [
        {
            "prompt": f"Say {n}",
            "completion": f"<think>{thought}</think>I say {n}" if n == 3 and thought else f"I say {n}",
        }
        for n in range(20)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    await control.client.import_dataset(find_sources([str(folder / f"{name}.jsonl")]), name)


@pytest.mark.slow
async def test_it_thinks_where_rows_do_and_as_the_recipe_says(control: Control, tmp_path: Path) -> None:
    add_base(control, SWITCHED)
    await import_rows(control, tmp_path, "plain", "")
    await import_rows(control, tmp_path, "thoughtful", "It is easy.")

    async def queued(dataset: str, thinking: str = "") -> str:
        run = await control.client.train(RECIPE.format(dataset=dataset, thinking=thinking))
        return parse_recipe((control.home.runs / run.id / "recipe.toml").read_text()).thinking

    assert await queued("plain") == "off"
    assert await queued("thoughtful") == "on"
    assert await queued("plain", 'thinking = "on"') == "on"
    assert await queued("thoughtful", 'thinking = "off"') == "off"
    add_base(control, CHATML)
    assert await queued("plain") == "auto", "a template that cannot be told"


@pytest.mark.parametrize(
    ("inherited", "thoughts", "thinks"),
    [
        ("auto", (0, 0), "off"),
        ("auto", (0, 3), "on"),
        ("auto", (0, None), "auto"),
        ("auto", (None, 3), "on"),
        ("off", (3,), "on"),
        ("on", (0,), "on"),
        ("off", (None,), "off"),
    ],
)
def test_what_is_left_open_follows_the_rows_and_then_the_release_that_is_gone_on_from(
    inherited: Any, thoughts: tuple[int | None, ...], thinks: str
) -> None:
    """None: an earlier version has imported the dataset, and has not counted."""
    assert _thinking(inherited, thoughts) == thinks
