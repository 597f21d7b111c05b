from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from appliance.errors import InvalidInput, NotFound
from appliance.home import Home
from appliance.models import count_linear, list_models, model_path, published_as, require_trainable

FILES = {
    "config.json": json.dumps({"max_position_embeddings": 2048}),
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    made.create()
    return made


def model(home: Home, name: str = "tiny", changed: dict[str, str | None] | None = None) -> Path:
    """A model directory whose files are FILES but for `changed`; None: without that file."""
    directory = home.models / name
    directory.mkdir()
    for file, content in {**FILES, **(changed or {})}.items():
        if content is not None:
            (directory / file).write_text(content)
    return directory


def test_models_are_listed_with_size_source_and_context(home: Home) -> None:
    directory = model(home, changed={"source.json": json.dumps({"source": "hub:org/tiny@1"})})
    model(home, "broken", {"config.json": "{"})
    model(home, ".tiny.building")
    [found] = list_models(home)
    assert (found.name, found.source, found.context) == ("tiny", "hub:org/tiny@1", 2048)
    assert found.bytes == sum(file.stat().st_size for file in directory.iterdir())


def test_a_model_put_there_by_hand_is_its_own_source(home: Home) -> None:
    directory = model(home, changed={"config.json": json.dumps({"text_config": {"max_position_embeddings": 99}})})
    [found] = list_models(home)
    assert (found.source, found.context) == (str(directory), 99)


def test_a_whole_model_is_found(home: Home) -> None:
    assert model(home) == model_path(home, "tiny")


@pytest.mark.parametrize("name", ["none", "../models", "", ".tiny.building"])
def test_a_missing_model_says_how_to_get_it(home: Home, name: str) -> None:
    model(home, ".tiny.building")
    with pytest.raises(NotFound, match="appliance pull"):
        model_path(home, name)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"config.json": None}, "lacks a config.json"),
        ({"config.json": "{"}, "lacks a config.json"),
        ({"model.safetensors": None}, "lacks weights in safetensors —"),
        ({"model.safetensors": None, "pytorch_model.bin": "x"}, "lacks weights in safetensors .*pickle"),
        ({"tokenizer.json": None}, "lacks a tokenizer"),
        ({"chat_template.jinja": None}, "lacks a chat template"),
        ({"config.json": '{"auto_map": {}}'}, "Python code of its own"),
        ({"tokenizer_config.json": '{"auto_map": {}}'}, "Python code of its own"),
    ],
)
def test_an_incomplete_model_names_what_it_lacks(home: Home, changed: dict[str, str | None], says: str) -> None:
    model(home, changed=changed)
    with pytest.raises(InvalidInput, match=says):
        model_path(home, "tiny")
    assert list_models(home) == []


def test_a_template_in_the_tokenizer_config_will_do(home: Home) -> None:
    model(home, changed={"chat_template.jinja": None, "tokenizer_config.json": '{"chat_template": "x"}'})
    assert model_path(home, "tiny")


def weights(rows: int) -> str:
    """A safetensors file with an embedding of so many rows."""
    tensor = {"dtype": "U8", "shape": [rows, 1], "data_offsets": [0, rows]}
    header = json.dumps({"model.embed_tokens.weight": tensor})
    return (len(header).to_bytes(8, "little") + header.encode() + b"x" * rows).decode()


@pytest.mark.parametrize("method", [{"quant_method": "bitsandbytes"}, {}])
def test_a_base_that_is_quantised_already_is_not_trained(home: Home, method: dict[str, str]) -> None:
    config = json.dumps({"quantization_config": {"load_in_4bit": True, **method}})
    with pytest.raises(InvalidInput, match=r"tiny is quantised already .*16 bits") as caught:
        require_trainable(model(home, changed={"config.json": config}))
    assert caught.value.code == "quantised_base"


def test_a_token_of_the_template_that_has_no_embedding_is_named(home: Home) -> None:
    added = [{"id": 98, "content": "<image>"}, {"id": 99, "content": "<|im_start|>"}]
    tokenizer = json.dumps({"added_tokens": added})
    files: dict[str, str | None] = {"tokenizer.json": tokenizer, "chat_template.jinja": "<|im_start|>{{ messages }}"}
    require_trainable(model(home, "whole", {**files, "model.safetensors": weights(100)}))
    require_trainable(model(home, "unused", {**files, "model.safetensors": weights(98), "chat_template.jinja": "a"}))
    with pytest.raises(InvalidInput, match=r"'<\|im_start\|>', a token that its 99 embeddings do not know"):
        require_trainable(model(home, "cut", {**files, "model.safetensors": weights(99)}))


@pytest.mark.parametrize(
    ("source", "published"),
    [
        ({"source": "hub:org/Base-1B@abc"}, "org/Base-1B"),
        ({"source": "pypi:wheel==1", "repo": "org/Base-1B"}, "org/Base-1B"),
        ({"source": "/data/Base-1B"}, "/data/Base-1B"),
        ({}, ""),
    ],
)
def test_it_goes_by_the_name_of_where_it_comes_from(home: Home, source: dict[str, str], published: str) -> None:
    assert published_as(model(home, changed={"source.json": json.dumps(source)})) == published


LINEAR = {
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.0.mlp.shared_expert.gate_proj.weight": (3, 4),
    "model.layers.0.block_sparse_moe.experts.7.w1.weight": (5, 4),
    "model.layers.0.mlp.experts.gate_up_proj": (2, 4, 6),
    "transformer.h.0.attn.c_attn.weight": (4, 12),
}
OTHERS = {
    "model.embed_tokens.weight": (9, 4),
    "model.embed_tokens_per_layer.weight": (9, 8),
    "transformer.wte.weight": (9, 4),
    "lm_head.weight": (9, 4),
    "embed_out.weight": (9, 4),
    "model.norm.weight": (4,),
    "model.layers.0.self_attn.q_proj.bias": (6,),
    "model.layers.0.mlp.gate.weight": (2, 4),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 4),
    "model.layers.0.mlp.router.weight": (2, 4),
    "model.layers.0.mlp.experts.down_proj_bias": (2, 4),
    "model.layers.0.mixer.conv1d.weight": (4, 1, 3),
    "model.layers.0.mixer.A_log": (4, 3),
    "vision_tower.patch_embedding.weight": (4, 3, 2, 2),
}


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_weights_of_linear_layers_and_experts_are_told_from_others(tmp_path: Path, name: str) -> None:
    tensors = {name: torch.zeros((LINEAR | OTHERS)[name], dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    assert count_linear(tmp_path) == (tensors[name].numel() if name in LINEAR else 0)
