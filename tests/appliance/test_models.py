from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance.errors import InvalidInput, NotFound
from appliance.home import Home
from appliance.models import list_models, model_path

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
