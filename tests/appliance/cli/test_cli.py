"""The `appliance` command as its user sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import Shell

ROWS = [{"instruction": f"Question {n}?", "output": f"Answer {n}."} for n in range(5)]


def write(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_a_verb_loads_no_more_than_it_needs(shell: Shell) -> None:
    code = "import sys; sys.argv = ['appliance', 'runs']\nfrom appliance.cli.main import main\n"
    code += "try: main()\nfinally: print('LOADED', *(name for name, module in sys.modules.items() if module))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=shell.environment, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.rpartition("LOADED")[2].split()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"sitecustomize"}
    client = {"httpx", "httpcore", "h11", "anyio", "sniffio", "idna", "certifi"}
    shapes = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert {package for package in packages if not package.startswith(("_", "brotli"))} <= client | shapes | {
        "appliance",
        "click",
    }
    assert "httpx._main" not in loaded
    ours = {name.removeprefix("appliance.") for name in loaded if name.startswith("appliance.")}
    nouns = {"cli", *(f"cli.{noun}" for noun in ("box", "chat", "datasets", "keys", "models", "releases", "runs"))}
    shared = {"api", "archive", "client", "errors", "home", "light_httpx", "settings", "sources", "words"}
    assert ours == nouns | shared | {"cli.console", "cli.main", "cli.session"}


def test_a_bare_command_in_a_pipe_prints_help(lonely: Shell) -> None:
    done = lonely.run()
    assert done.returncode == 2
    assert "Usage: appliance" in done.stdout


def test_a_mistyped_verb(lonely: Shell) -> None:
    assert "train" in lonely.refuses(2, "trian")
    assert "appliance data import --help" in lonely.refuses(2, "data", "import")


@pytest.mark.parametrize(
    "arguments",
    [("runs",), ("status", "--json"), ("stop", "x"), ("chat", "hi"), ("data", "list"), ("logs", "x", "-f")],
    ids=" ".join,
)
def test_without_a_daemon_every_verb_says_how_to_start_it(lonely: Shell, arguments: tuple[str, ...]) -> None:
    assert "start it with `appliance serve`" in lonely.refuses(3, *arguments)
    assert not lonely.home.exists()


def test_import_list_and_show(shell: Shell, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.json", [*ROWS, {"instruction": "No answer?", "output": ""}, {"other": 1}, ROWS[0]])
    report = json.loads(shell.run("data", "import", file, "--json").stdout)
    assert (report["rows_in"], report["kept"], report["dropped"], report["duplicates"]) == (8, 5, 2, 1)
    assert report["name"] == "mine"
    again = shell.run("data", "import", file, "--name", "again")
    assert again.stdout.strip() == report["id"]
    assert "5 kept, 2 dropped, 1 duplicates" in again.stderr
    assert {one["name"] for one in json.loads(shell.run("data", "list", "--json").stdout)} >= {"mine", "again"}
    assert report["id"] in shell.run("data", "list").stdout
    shown = json.loads(shell.run("data", "show", "mine", "--row", "1", "--rows", "2", "--json").stdout)
    assert (shown["rows"]["total"], shown["rows"]["offset"], len(shown["rows"]["rows"])) == (5, 1, 2)
    assert "assistant: Answer 0." in shell.run("data", "show", report["id"]).stdout


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.json", b"", "empty"),
        ("broken.json", b'[{"instruction": "a",\n "output": }]', "line 2"),
        ("broken.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": \n', "line 2"),
        ("strange.json", b'[{"x": 1}, {"y": 2}]', "none of the 2 rows"),
        ("latin.json", b'[{"instruction": "caf\xe9", "output": "b"}]', "byte"),
    ],
)
def test_a_file_that_cannot_be_used(shell: Shell, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    before = shell.run("data", "list", "--json").stdout
    line = shell.refuses(2, "data", "import", str(tmp_path / name))
    assert says in line
    assert name in line
    assert shell.run("data", "list", "--json").stdout == before
    assert list((shell.home / "incoming").iterdir()) == []


def test_a_table_with_columns_of_its_own(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text('question,answer\n"Who?","I,\nthen"\n')
    arguments = ("data", "import", str(tmp_path / "table.csv"), "--map")
    assert "there are question, answer" in shell.refuses(2, *arguments, "instruction=query,output=answer")
    done = shell.run(*arguments, "instruction=question,output=answer", "--json")
    assert json.loads(done.stdout)["format"] == {"alpaca": 1}


def test_a_missing_file_and_a_directory(shell: Shell, tmp_path: Path) -> None:
    assert "does not exist" in shell.refuses(2, "data", "import", str(tmp_path / "nope.json"))
    assert "holds no data files" in shell.refuses(2, "data", "import", str(tmp_path))


def test_names_that_nothing_goes_by(shell: Shell) -> None:
    for arguments in (
        ("data", "show", "nope"),
        ("runs", "nope"),
        ("logs", "nope"),
        ("logs", "nope", "-f"),
        ("stop", "nope"),
        ("resume", "nope"),
        ("releases", "nope"),
        ("promote", "nope"),
        ("promote", "nope", "--canary", "10%"),
        ("promote", "nope", "--canary", "0.1"),
        ("keys", "revoke", "nope"),
    ):
        assert "there is no" in shell.refuses(5, *arguments)
    assert "no release was live before" in shell.refuses(5, "rollback")


@pytest.mark.parametrize("share", ["10", "0", "100%", "1", "-5%", "few", "nan", ""])
def test_a_canarys_share_that_is_none(shell: Shell, share: str) -> None:
    assert "write 10% or 0.1" in shell.refuses(2, "promote", "nope", "--canary", share)


def test_recipes_that_cannot_run(shell: Shell, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "x"\nbase = "none"\n[[stages]]\nmethod = "sft"\ndataset = "mine"\nlearing_rate = 1')
    assert "did you mean `learning_rate`" in shell.refuses(2, "train", str(recipe))
    recipe.write_text('name = "x"\nbase = "none"')
    assert "appliance pull none" in shell.refuses(5, "train", str(recipe))
    assert "demo" in shell.refuses(2, "train", "no-such-recipe")
    broken = shell.home / "models" / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    (broken / "model.safetensors").write_bytes(b"")
    recipe.write_text('name = "x"\nbase = "broken"')
    assert "tokenizer" in shell.refuses(2, "train", str(recipe))
    assert json.loads(shell.run("runs", "--json").stdout) == []


def test_keys(shell: Shell) -> None:
    key = json.loads(shell.run("keys", "create", "app", "--json").stdout)
    assert key["key"].startswith("sk-")
    listed = shell.run("keys", "list").stdout
    assert key["id"] in listed
    assert key["key"] not in listed
    assert shell.run("keys", "revoke", key["id"]).returncode == 0
    assert "revoked" in shell.run("keys", "list").stdout


def test_a_chat_without_a_live_model(shell: Shell) -> None:
    assert "no model is live" in shell.refuses(3, "chat", "hello")


def test_a_second_daemon_on_the_same_home(shell: Shell) -> None:
    assert "serves" in shell.refuses(5, "serve", APPLIANCE_PORT="0")


def test_a_port_in_use(shell: Shell, lonely: Shell) -> None:
    endpoint = json.loads(shell.run("status", "--json").stdout)["endpoint"]
    port = endpoint.removesuffix("/v1").rpartition(":")[2]
    assert f"port {port} on 127.0.0.1 is in use" in lonely.refuses(5, "serve", "--port", port)


def test_an_open_address_needs_a_key_first(lonely: Shell) -> None:
    assert "no API key" in lonely.refuses(4, "serve", "--host", "0.0.0.0", "--port", "0")


def test_settings_that_are_wrong(lonely: Shell) -> None:
    assert "APPLIANCE_PORT" in lonely.refuses(2, "serve", APPLIANCE_PORT="x")


def test_doctor(shell: Shell) -> None:
    done = shell.run("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["daemon"]["status"] == "ok"
    assert findings["torch"]["status"] == "ok"
    assert done.returncode == 0


@pytest.fixture
def member(shell: Shell, tmp_path: Path) -> Shell:
    """A person for whom the daemon of `shell` is the service."""
    return Shell(tmp_path / "own", APPLIANCE_SOCKET=str(shell.home / "control.sock"))


def test_doctor_makes_nothing_and_looks_at_the_service(shell: Shell, member: Shell) -> None:
    findings = {one["name"]: one for one in json.loads(member.run("doctor", "--json").stdout)}
    assert findings["daemon"]["status"] == "ok"
    assert str(shell.home) in findings["home"]["summary"]
    assert not member.home.exists()


def test_doctor_without_a_daemon_makes_nothing(lonely: Shell) -> None:
    findings = {one["name"]: one for one in json.loads(lonely.run("doctor", "--json").stdout)}
    assert (findings["daemon"]["status"], findings["home"]["status"]) == ("warn", "ok")
    assert not lonely.home.exists()


def test_a_pull_of_a_member_is_the_services_and_makes_no_home(shell: Shell, member: Shell) -> None:
    assert "is no model that can be pulled" in member.refuses(1, "pull", "nope")
    assert not member.home.exists()
    assert "never is not being pulled" in member.refuses(5, "pull", "never", "--stop")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 70 MB; mounting needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_keeps_nothing_by_halves(small_disk: Path, tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    row = json.dumps({"instruction": "q", "output": "a" * 1_000_000})
    file.write_text("\n".join(row.replace("q", f"q{n}") for n in range(80)))
    crowded = Shell(small_disk / "home")
    daemon = crowded.start()
    try:
        while crowded.run("status").returncode:
            assert daemon.poll() is None
        line = crowded.refuses(1, "data", "import", str(file))
        assert "free" in line
        assert list((small_disk / "home" / "datasets").iterdir()) == []
        assert list((small_disk / "home" / "incoming").iterdir()) == []
        assert crowded.run("status").returncode == 0
    finally:
        daemon.terminate()
        daemon.wait(60)
