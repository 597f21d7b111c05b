"""What is refused of a release that comes from elsewhere, however well its hashes agree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model

from appliance.errors import InvalidInput
from appliance.home import hashes
from appliance.release import foreign


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a release as they leave a box."""
    folder = make_model(tmp_path_factory.mktemp("exported") / "r-1")
    (folder / "source.json").unlink()
    (folder / "README.md").write_text("# r-1")
    (folder / "LICENSE").write_text("free")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copy(folder / "model.safetensors", folder / "adapter" / "adapter_model.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"files": hashes(folder)}))
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "r-1"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_what_a_box_exports_is_taken(folder: Path) -> None:
    foreign.check_foreign(folder)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pickle_too(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("import os")


def auto_map(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config.update(auto_map={"AutoConfig": "evil.Config"}))


def auto_map_of_the_tokenizer(folder: Path) -> None:
    rewrite(
        folder / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["evil.T", None]})
    )


def adapter_in_the_root(folder: Path) -> None:
    for path in (folder / "adapter").iterdir():
        shutil.copy(path, folder)


def code_below_the_adapter(folder: Path) -> None:
    (folder / "adapter" / "custom").mkdir()
    (folder / "adapter" / "custom" / "generate.py").write_text("")


def huge_header(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.write((1 << 62).to_bytes(8, "little"))


def cut_short(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)


def longer_than_it_says(folder: Path) -> None:
    with open(folder / "adapter" / "adapter_model.safetensors", "ab") as file:
        file.write(b"more")


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


def other_kind(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config.update(model_type="vit"))


def no_such_kind(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config.update(model_type="evil"))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (pickle_only, "'pytorch_model.bin' is no file of a release"),
        (pickle_too, "'pytorch_model.bin' is no file of a release"),
        (code, "'modeling_evil.py' is no file of a release"),
        (auto_map, "runs Python code of its own"),
        (auto_map_of_the_tokenizer, "runs Python code of its own"),
        (adapter_in_the_root, r"'adapter_config\.json' is no file of a release"),
        (code_below_the_adapter, "'generate.py' is no file of a release"),
        (huge_header, r"model\.safetensors holds no usable model"),
        (cut_short, "not as long as its header says"),
        (longer_than_it_says, r"adapter_model\.safetensors .*not as long as its header says"),
        (no_template, "lacks a chat template"),
        (template("{{ 'x ' * 9999 }}"), "tokens of a short question"),
        (template("{{ messages[0]['role'] }}"), "or leaves it out"),
        (template("{% for"), "the chat template refuses"),
        (other_kind, "it is a vit, which is no language model"),
        (no_such_kind, "evil"),
        (no_tokenizer, "KeyError: 'added_tokens'"),
    ],
)
def test_what_no_box_exports_is_refused(folder: Path, fault: Callable[[Path], None], says: str) -> None:
    fault(folder)
    with pytest.raises(InvalidInput, match=says):
        foreign.check_foreign(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, ""),
        ("{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4, "TimeoutError: reading it takes longer than 2 s"),
        ("{{ ('x' * 100000) * 100000 }}", "MemoryError"),
    ],
)
def test_reading_it_is_bounded_and_ends_in_one_line(folder: Path, tmp_path: Path, text: str | None, says: str) -> None:
    if text:
        template(text)(folder)
    (tmp_path / "request.json").write_text(foreign.ForeignRequest(folder=folder, name="r-1").model_dump_json())
    code = "import sys\nfrom pathlib import Path\nfrom appliance.release import foreign\n"
    code += f"foreign.SECONDS = {2 if 'longer' in says else 60}\nforeign.main(*map(Path, sys.argv[1:]))"
    files = [str(tmp_path), str(tmp_path / "request.json"), str(tmp_path / "result.json")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=100)
    outcome = json.loads((tmp_path / "result.json").read_bytes())
    if text is None:
        assert outcome == {}
        return
    message = outcome["problem"]["message"]
    assert message.startswith("the release cannot be imported: ")
    assert says in message
    assert str(tmp_path) not in message
    assert "\n" not in message
