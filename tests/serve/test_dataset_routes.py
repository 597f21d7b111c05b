from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from chat_templates import CHATML, make_tokenizer
from controlling import Control
from safetensors.numpy import save_file

from appliance.client import Client
from appliance.errors import ApplianceError, Conflict, InvalidInput, NotFound
from appliance.home import building, write_json
from appliance.release.manifest import Manifest
from appliance.sources import SourceFile, find_sources
from appliance.train.recipe import dump_recipe, parse_recipe
from serve.control import datasets as routes


def write(path: Path, numbers: Any, answer: str = "a") -> str:
    rows = [{"instruction": f"question {number}", "output": f"{answer} {number}"} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


async def imported(control: Control, path: str, name: str, **how: Any) -> str:
    return str((await control.client.import_dataset(find_sources([path]), name, **how))["id"])


async def test_keys_are_ignored_where_that_is_asked_for(control: Control, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a", "images": ["x"], "history": "h"}')
    with pytest.raises(InvalidInput, match="holds more than text"):
        await imported(control, str(tmp_path / "a.jsonl"), "a")
    await imported(control, str(tmp_path / "a.jsonl"), "a", ignore=("images", "history"))
    assert (await control.client.dataset("a"))["unread"] == {}


def refer(control: Control, dataset: str, state: str) -> str:
    """A run whose recipe names the dataset."""
    text = f'name = "r"\nbase = "tiny"\n[[stages]]\nmethod = "sft"\ndataset = "{dataset}"'
    recipe = parse_recipe(text)
    id = control.supervisor.runs.new_id(recipe)
    with building(control.home.runs / id) as directory:
        (directory / "recipe.toml").write_text(dump_recipe(recipe))
    control.supervisor.runs.add(id, recipe)
    if state != "queued":
        control.supervisor.runs.finish(id, state)  # type: ignore[arg-type]
    return id


async def test_several_files_become_one_dataset(control: Control, tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", range(5))
    write(tmp_path / "a.jsonl", range(3, 8))
    report = await control.client.import_dataset(find_sources([str(tmp_path / "*.jsonl")]), "both")
    assert (report["rows_in"], report["kept"], report["duplicates"]) == (10, 8, 2)
    page = await control.client.rows("both")
    assert page.rows[0]["source"] == {"file": "a.jsonl", "line": 1}
    assert page.rows[-1]["source"] == {"file": "b.jsonl", "line": 3}
    (tmp_path / "c.jsonl").write_text('{"x": 1}\n')
    report = await control.client.import_dataset(find_sources([str(tmp_path / "*.jsonl")]), "all")
    assert report["drops"][0]["file"] == "c.jsonl"


async def test_standard_input_of_unknown_length(control: Control, tmp_path: Path, monkeypatch: Any) -> None:
    content = open(write(tmp_path / "x", range(4000)), "rb")  # noqa: SIM115  # the upload closes it
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": content}))
    first = SourceFile(Path(write(tmp_path / "a.jsonl", range(4000, 4002))), "a.jsonl")
    report = await control.client.import_dataset([first, SourceFile(None, "stdin")], "piped")
    assert report["kept"] == 4002


async def test_a_file_that_shrinks_while_it_is_sent(control: Control, tmp_path: Path) -> None:
    head = json.dumps([{"filename": "a.jsonl", "bytes": 100}, {"filename": "b.jsonl", "bytes": 5}]) + "\n"
    async with httpx.AsyncClient(transport=control.client._http._transport, base_url="http://x") as plain:
        for body, says in ((head + "x" * 60, "40 bytes too early"), ("hello", "list of its files"), ("", "list of")):
            answer = await plain.post("/v1/datasets", params={"name": "x"}, content=body)
            assert answer.status_code == 400
            assert says in answer.json()["message"]
    assert list(control.home.incoming.iterdir()) == list(control.home.datasets.iterdir()) == []


async def test_export_and_import_give_the_same_dataset(control: Control, tmp_path: Path) -> None:
    rows = [
        {"instruction": "\u4f60\u597d \u2028", "output": "\U0001f389"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    first = await imported(control, str(tmp_path / "rows.json"), "first")
    exported = b"".join([piece async for piece in control.client.export_dataset("first")])
    assert len(exported.splitlines()) == 2
    assert b"source" not in exported
    (tmp_path / "again.jsonl").write_bytes(exported)
    assert await imported(control, str(tmp_path / "again.jsonl"), "again") == first
    with pytest.raises(NotFound):
        [piece async for piece in control.client.export_dataset("nope")]


async def test_what_two_datasets_share(control: Control, tmp_path: Path) -> None:
    await imported(control, write(tmp_path / "one.jsonl", range(10)), "one")
    await imported(control, write(tmp_path / "two.jsonl", range(6, 30)), "two")
    found = await control.client.diff_datasets("one", "two")
    assert (found.shared, found.only) == (4, (6, 20))
    assert [len(side) for side in found.examples] == [6, 10]
    assert found.examples[0][0]["messages"][0]["content"] == "question 0"
    assert found.examples[1][0]["messages"][0]["content"] == "question 10"
    same = await control.client.diff_datasets("one", "one")
    assert (same.shared, same.only) == (10, (0, 0))


async def test_a_dataset_goes_with_its_last_name(control: Control, tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", range(3))
    id = await imported(control, path, "one")
    assert await imported(control, path, "two") == id
    await control.client.remove_dataset("one")
    assert [dataset.name for dataset in await control.client.datasets()] == ["two"]
    assert (await control.client.rows("two")).total == 3
    await control.client.remove_dataset("two")
    assert await control.client.datasets() == []
    assert list(control.home.datasets.iterdir()) == []
    with pytest.raises(NotFound):
        await control.client.remove_dataset("two")
    assert await imported(control, path, "one") == id


@pytest.mark.parametrize(
    ("state", "refused"), [("queued", True), ("stopped", True), ("failed", True), ("finished", False)]
)
async def test_what_a_run_refers_to_stays(control: Control, tmp_path: Path, state: str, refused: bool) -> None:
    path = write(tmp_path / "one.jsonl", range(3))
    id = await imported(control, path, "one")
    run = refer(control, id, state)
    if refused:
        with pytest.raises(Conflict, match=f"is needed by run {run}"):
            await control.client.remove_dataset("one")
        await imported(control, path, "two")
        await control.client.remove_dataset("one")
        assert (await control.client.rows("two")).total == 3
    else:
        await control.client.remove_dataset("one")


async def test_what_a_release_was_made_from_stays(control: Control, tmp_path: Path) -> None:
    id = await imported(control, write(tmp_path / "one.jsonl", range(3)), "one")
    run = refer(control, id, "finished")
    with building(control.home.releases / run) as directory:
        words = {"release": run, "state": "verified", "reason": "", "base": "tiny", "recipe_sha256": "", "created": 1.0}
        manifest = {each.name: {} for each in fields(Manifest)} | words | {"datasets": {"sft": id}}
        write_json(directory / "manifest.json", manifest)
    with pytest.raises(Conflict, match=f"needed by release {run}"):
        await control.client.remove_dataset("one")


async def test_error_findings_block_training_on_that_base(control: Control, tmp_path: Path) -> None:
    id = await imported(control, write(tmp_path / "one.jsonl", range(3)), "one")
    report = control.home.datasets / id / "report.json"
    content = json.loads(report.read_bytes())
    finding = {"level": "error", "code": "no_end_of_turn", "count": 3, "message": "it would not learn to stop"}
    recipe = 'name = "r"\nbase = "tiny"\n[[stages]]\nmethod = "sft"\ndataset = "one"'
    model(control, "tiny")
    for base, blocked in (("tiny", True), ("other", False), (None, True)):
        content["findings"] = [finding | ({"base": base} if base else {})]
        write_json(report, content)
        if blocked:
            with pytest.raises(InvalidInput, match="cannot be trained on: it would not learn to stop"):
                await control.client.train(recipe)
        else:
            assert (await control.client.train(recipe)).state == "queued"


def model(control: Control, name: str) -> Path:
    folder = control.home.models / name
    make_tokenizer(CHATML).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    save_file({}, folder / "model.safetensors")
    return folder


async def test_rows_are_rendered_by_the_base_with_the_mask(control: Control, tmp_path: Path) -> None:
    await imported(control, write(tmp_path / "one.jsonl", range(3)), "one")
    with pytest.raises(InvalidInput, match="no base model is named"):
        await control.client.rendered("one")
    model(control, "tiny")
    ((conversation,),) = await control.client.rendered("one", offset=1)
    assert "".join(piece.text for piece in conversation.pieces) == (
        "<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\na 1<|im_end|>"
    )
    assert "".join(piece.text for piece in conversation.pieces if piece.trained) == "a 1<|im_end|>"
    assert {piece.text for piece in conversation.pieces if piece.special} == {"<|im_start|>", "<|im_end|>"}
    assert (conversation.trained, conversation.tokens) == (4, 32)
    report = await control.client.import_dataset(find_sources([str(tmp_path / "one.jsonl")]), "one", max_length=31)
    assert report["tokens"]["base"] == "tiny"
    assert report["tokens"]["truncated_rows"] == 3


@pytest.mark.slow
async def test_an_import_ends_with_its_client_and_leaves_nothing(control: Control, tmp_path: Path) -> None:
    path = write(tmp_path / "large.jsonl", range(150_000))
    app = control.client._http._transport.app  # type: ignore[attr-defined]
    server = uvicorn.Server(uvicorn.Config(app, uds=str(tmp_path / "sock"), log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)
    async with Client(tmp_path / "sock") as client:
        asking = asyncio.create_task(client.import_dataset(find_sources([path]), "large"))
        (child,) = await importers()
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
    async with asyncio.timeout(60):
        while psutil.pid_exists(child) or list(control.home.incoming.iterdir()):
            await asyncio.sleep(0.05)
    assert await control.client.datasets() == []
    async with Client(tmp_path / "sock") as client:
        asking = asyncio.create_task(client.import_dataset(find_sources([path]), "large"))
        (child,) = await importers()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(Conflict, match="nothing was kept"):
            await asking
    assert list(control.home.incoming.iterdir()) == list(control.home.datasets.iterdir()) == []
    server.should_exit = True
    await serving


def _imports(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # one that has just ended, and that nobody has waited for
        return "appliance.data.importer" in process.cmdline()
    return False


async def importers() -> list[int]:
    """The importing processes under this one, once there are some."""
    async with asyncio.timeout(60):
        while True:
            found = [child.pid for child in psutil.Process().children() if _imports(child)]
            if found:
                return found
            await asyncio.sleep(0.02)


async def test_a_dataset_removed_while_it_is_imported_again(control: Control, tmp_path: Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "one.jsonl", range(3))
    await imported(control, path, "one")
    run = routes.run_module

    async def removing(module: str, *rest: Any) -> Any:
        outcome = await run(module, *rest)
        await control.client.remove_dataset("one")
        return outcome

    monkeypatch.setattr(routes, "run_module", removing)
    with pytest.raises(ApplianceError, match="was removed while"):
        await imported(control, path, "one")
    assert await control.client.datasets() == []
