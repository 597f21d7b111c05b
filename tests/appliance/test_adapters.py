"""What an adapter from elsewhere says of itself, and for which base it is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from appliance.adapters import About, read_about, require_meant_for
from appliance.errors import InvalidInput

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/Base-1B"}')
    save_file({KEY.format(part): torch.ones(2, 2) for part in "AB"}, folder / "adapter_model.safetensors")
    return folder


def base(folder: Path, name: str = "base-1b", source: str = "", template: str = "T", eos: Any = "<end>") -> Path:
    made = folder / name
    made.mkdir()
    (made / "source.json").write_text(json.dumps({"source": source}))
    (made / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    (made / "chat_template.jinja").write_text(template)
    return made


def test_its_settings_template_and_end_token_are_read(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    assert read_about(adapter) == About(config=config)
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "own", "eos_token": {"content": "<eot>"}}')
    assert read_about(adapter) == About(config=config, chat_template="own", eos_token="<eot>")
    (adapter / "chat_template.jinja").write_text("its file")
    assert read_about(adapter).chat_template == "its file"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "no adapter_config.json that can be read"),
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "can run code"),
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.pt"), "can run code"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (
            lambda folder: save_file(
                {"m.lora_A.default.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors"
            ),
            "named as in memory",
        ),
    ],
)
def test_what_is_no_saved_adapter_is_named_for_what_it_is(adapter: Path, change: Any, says: str) -> None:
    change(adapter)
    with pytest.raises(InvalidInput, match=says) as caught:
        read_about(adapter)
    assert "PEFT" in caught.value.next


def meant(base: Path, **about: Any) -> None:
    said = {key: about.pop(key, False) for key in ("same_base", "base_template")}
    named = about.pop("named", "")
    require_meant_for(base, About(config={"base_model_name_or_path": named}, **about), **said)


@pytest.mark.parametrize(
    ("named", "name", "source"),
    [
        ("", "base-1b", ""),
        ("org/Base-1B", "base-1b", ""),
        ("/data/models/base-1b/", "base-1b", ""),
        ("org/Base-1B", "mine", "hub:org/Base-1B@abc"),
        ("unsloth/Base-1B-bnb-4bit", "base-1b", ""),
        ("./Base-1B", "mine", "/data/Base-1B"),
        ("unsloth/base-1b-unsloth-bnb-4bit", "base-1b", ""),
        ("org/BASE-1B", "Base-1B", ""),
    ],
)
def test_a_base_goes_by_its_name_here_and_by_that_of_where_it_comes_from(
    tmp_path: Path, named: str, name: str, source: str
) -> None:
    meant(base(tmp_path, name, source), named=named)


@pytest.mark.parametrize("named", ["org/Base-1B-Instruct", "org/Base-3B", "checkpoint-500", "/"])
def test_another_base_is_asked_back(tmp_path: Path, named: str) -> None:
    here = base(tmp_path, source="hub:org/Base-1B@abc" if named != "/" else "")
    with pytest.raises(InvalidInput, match="--same-base") as caught:
        meant(here, named=named)
    assert caught.value.code == "another_base"
    meant(here, named=named, same_base=True)


@pytest.mark.parametrize("own", [{"chat_template": "other"}, {"eos_token": "<eot>"}])
def test_another_template_or_end_token_is_asked_back(tmp_path: Path, own: dict[str, str]) -> None:
    here = base(tmp_path)
    meant(here, chat_template="T\n", eos_token="<end>")
    with pytest.raises(InvalidInput, match="--base-template") as caught:
        meant(here, **own)
    assert caught.value.code == "another_template"
    meant(here, **own, base_template=True)


@pytest.mark.parametrize(
    ("file", "held"),
    [
        ("tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": "other"}]}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "own"}]}),
        ("chat_template.json", {"chat_template": "own"}),
    ],
)
def test_a_template_is_found_wherever_it_is_kept(adapter: Path, file: str, held: dict[str, Any]) -> None:
    (adapter / file).write_text(json.dumps(held))
    assert read_about(adapter).chat_template == ("" if "tool_use" in str(held) else "own")


def test_an_end_token_may_stand_among_the_special_ones(adapter: Path) -> None:
    (adapter / "special_tokens_map.json").write_text('{"eos_token": "<eot>"}')
    assert read_about(adapter).eos_token == "<eot>"
