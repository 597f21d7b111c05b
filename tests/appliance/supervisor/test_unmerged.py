"""An adapter that answers on the live release's engine until its own release does."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mortal_daemon import Daemon

from appliance.errors import ApplianceError, Conflict
from appliance.home import Home, hashes
from appliance.release.manifest import Manifest
from appliance.supervisor import unmerged
from appliance.supervisor.unmerged import Unmerged
from appliance.train.recipe import Given, Recipe


@pytest.fixture
async def ready(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> tuple[Daemon, str, str]:
    """A daemon with a live release and a run whose merge waits for a file."""
    monkeypatch.setattr(Unmerged, "write", lambda *_: None)
    daemon.engine.adapter_rank = 64
    live = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == live)
    run = daemon.queue(merge="wait")
    await daemon.until(lambda: daemon.running("worker") == [run] and daemon.supervisor.runs.get(run).stage == "merge")
    return daemon, live, run


def go_on(daemon: Daemon, run: str) -> None:
    (daemon.home.runs / run / "go").touch()


async def test_it_answers_at_once_and_its_release_takes_over(ready: tuple[Daemon, str, str]) -> None:
    daemon, live, run = ready
    daemon.supervisor.runs.set_promotes(run, False)
    now = await daemon.supervisor.promote_adapter(run)
    assert (now.name, now.live, now.answers) == (f"{run}+adapter", live, True)
    assert daemon.frontage.routes == [live, f"{run}+adapter"]
    assert daemon.supervisor.releases.live() == live
    go_on(daemon, run)
    await daemon.until(lambda: daemon.supervisor.routed == run and daemon.supervisor.adapter_status() is None)
    assert daemon.frontage.routes == [live, f"{run}+adapter", run], "nobody else answered in between"
    assert True not in daemon.frontage.holds[1:], "nobody had to wait"


async def test_asked_twice_it_goes_on(ready: tuple[Daemon, str, str]) -> None:
    daemon, live, run = ready
    first = await daemon.supervisor.promote_adapter(run)
    assert await daemon.supervisor.promote_adapter(run) == first
    assert daemon.frontage.routes == [live, f"{run}+adapter"]


@pytest.mark.parametrize("how", ["fail", "refuse"])
async def test_where_its_release_does_not_come_the_live_one_answers_again(
    ready: tuple[Daemon, str, str], how: str
) -> None:
    daemon, live, run = ready
    await daemon.supervisor.promote_adapter(run)
    (daemon.home.runs / run / "behaviour.json").write_text(json.dumps({"verify": how}))
    go_on(daemon, run)
    await daemon.until(lambda: daemon.supervisor.adapter_status() is None)
    await daemon.until(lambda: daemon.frontage.routes[-1] == live)
    assert daemon.supervisor.releases.live() == live
    assert daemon.supervisor.unmerged.ended_because(run) == f"{run} ended, and its release did not go live"


async def test_rollback_ends_it_and_its_release_does_not_go_live(ready: tuple[Daemon, str, str]) -> None:
    daemon, live, run = ready
    await daemon.supervisor.promote_adapter(run)
    assert daemon.supervisor.rollback().id == live
    await daemon.until(lambda: daemon.frontage.routes[-1] == live)
    go_on(daemon, run)
    await daemon.until_state(run, "finished")
    assert daemon.supervisor.releases.live() == live


@pytest.mark.parametrize("victim", ["daemon", "engine", "both"])
async def test_killed_it_answers_again(ready: tuple[Daemon, str, str], victim: str) -> None:
    daemon, live, run = ready
    await daemon.supervisor.promote_adapter(run)
    daemon.frontage.routes.clear()
    engine = daemon.pid("engine", live)
    if victim != "engine":
        await daemon.die()
    if victim != "daemon":
        os.kill(engine, signal.SIGKILL)
    if victim != "engine":
        daemon.start()
    await daemon.until(lambda: daemon.frontage.routes and daemon.frontage.routes[-1] == f"{run}+adapter")
    assert len(daemon.engine.adapters) > 1, "it was given again"
    go_on(daemon, run)
    await daemon.until(lambda: daemon.supervisor.routed == run)


async def test_an_engine_that_refuses_it(ready: tuple[Daemon, str, str]) -> None:
    daemon, live, run = ready
    daemon.engine.refusal = "rank 99 is too much"
    with pytest.raises(Conflict, match="rank 99 is too much"):
        await daemon.supervisor.promote_adapter(run)
    assert daemon.frontage.routes == [live]
    assert daemon.supervisor.adapter_status() is None


@pytest.mark.parametrize("case", ["engine", "exclusive", "live", "stage", "canary"])
async def test_where_it_cannot_be(ready: tuple[Daemon, str, str], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    daemon, _, run = ready
    expected = {"engine": "merged weights only", "exclusive": "lease", "live": "no release is live"}
    expected |= {"stage": "is queued at sft", "canary": "is the canary"}
    if case == "engine":
        daemon.engine.adapter_rank = 0
    elif case == "exclusive":
        daemon.supervisor.exclusive = True
    elif case == "live":
        monkeypatch.setattr(daemon.supervisor.releases, "live", lambda: None)
    elif case == "stage":
        run = daemon.queue()
    else:
        monkeypatch.setattr(daemon.supervisor.trial, "view", lambda: type("View", (), {"release": "c"}))
    with pytest.raises(Conflict, match=expected[case]):
        await daemon.supervisor.promote_adapter(run)
    monkeypatch.undo()
    assert daemon.supervisor.adapter_status() is None


async def test_no_canary_beside_it(ready: tuple[Daemon, str, str]) -> None:
    daemon, live, run = ready
    await daemon.supervisor.promote_adapter(run)
    with pytest.raises(Conflict, match="answers, unmerged"):
        daemon.supervisor.start_canary(live, 0.1)


RECIPE = Recipe(name="facts", base="tiny", given=Given(sha256="0", quantised=False))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Home, list[Any]]:
    """A home with a base and the live release `r1` of it; what is asked of `write_difference`."""
    home = Home(tmp_path)
    home.create()
    base = home.models / "tiny"
    base.mkdir()
    for name, text in {"config.json": '{"a": 1}', "tokenizer.json": "{}", "chat_template.jinja": "x"}.items():
        (base / name).write_text(text)
    (base / "model.safetensors").write_bytes(b"weights")
    (home.releases / "r1" / "adapter").mkdir(parents=True)
    write_manifest(home, {"base_files": hashes(base), "merge": {"kept": "16-bit"}})
    asked: list[Any] = []
    monkeypatch.setattr(unmerged, "write_difference", lambda *arguments: asked.append(arguments))
    return home, asked


def write_manifest(home: Home, manifest: dict[str, Any]) -> None:
    known: dict[str, Any] = {field.name: {} for field in dataclasses.fields(Manifest)}
    known |= {"release": "r1", "state": "verified", "reason": "", "created": 1.0, "base": "tiny", "recipe_sha256": ""}
    manifest = known | manifest
    (home.releases / "r1" / "manifest.json").write_text(json.dumps(manifest))


def write(home: Home, recipe: Recipe = RECIPE) -> None:
    Unmerged(home, None, None).write("r2", "r1", recipe, 64)  # type: ignore[arg-type]  # neither is asked here


@pytest.mark.parametrize("own", [True, False])
def test_what_leads_from_the_live_release_to_the_adapter(files: tuple[Home, list[Any]], own: bool) -> None:
    home, asked = files
    merged = home.releases / "r1" / "adapter"
    if not own:
        merged.rmdir()
    write(home)
    run = home.runs / "r2"
    assert asked == [(run / "adapter", merged if own else None, run / "unmerged", 64)]


def test_a_run_that_trains_nothing(files: tuple[Home, list[Any]]) -> None:
    home, asked = files
    with pytest.raises(Conflict, match="releases the base as it is"):
        write(home, Recipe(name="facts", base="tiny"))
    assert asked == []


@pytest.mark.parametrize("case", ["base", "precision"])
def test_weights_that_it_was_not_trained_on(files: tuple[Home, list[Any]], case: str) -> None:
    home, asked = files
    if case == "base":
        (home.models / "tiny" / "model.safetensors").write_bytes(b"others")
    else:
        manifest = {"base_files": hashes(home.models / "tiny"), "merge": {"kept": "dequantised"}}
        write_manifest(home, manifest)
    with pytest.raises(ApplianceError) as caught:
        write(home)
    assert caught.value.code == f"another_{case}"
    assert asked == []
