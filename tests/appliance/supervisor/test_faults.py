"""Effects that fail: what the box does then, what it does not, and what it says."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from mortal_daemon import RECIPE, Daemon

from appliance.errors import InvalidInput
from appliance.home import Home, building
from appliance.store.processes import Processes, ProcessRow
from appliance.store.runs import Runs
from appliance.supervisor import decide, engine_processes, processes, workers
from appliance.supervisor.engines import EngineCommand
from appliance.supervisor.processes import MARK
from appliance.supervisor.queueing import queueing
from appliance.supervisor.supervisor import Supervisor
from appliance.supervisor.unmerged import Unmerged
from appliance.train.recipe import dump_recipe

FULL = sqlite3.OperationalError("database or disk is full")


def children(home: Home) -> list[psutil.Process]:
    """The living processes that carry the mark of this home, on record or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").endswith(f":{home.root}") and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


async def live(daemon: Daemon) -> str:
    run = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    return run


async def another(daemon: Daemon) -> str:
    """A verified release that is not live."""
    run = daemon.queue(RECIPE.model_copy(update={"promote": False}))
    await daemon.until_state(run, "finished")
    await daemon.until(lambda: run not in daemon.running("engine"))
    return run


@pytest.mark.parametrize("write", ["before it is started", "after it is started"])
async def test_an_engine_that_cannot_be_recorded_does_not_run_and_is_not_started_again_and_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    monkeypatch.setattr(decide, "WRITE_REST_SECONDS", 0.3)
    first = await live(daemon)
    second = await another(daemon)
    attempts = len(daemon.engine.started)
    add = Processes.add

    def fail(self: Processes, row: ProcessRow) -> None:
        if (row.pid > 0) == (write == "after it is started") and row.kind == "engine":
            raise FULL
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "add", fail)
        daemon.supervisor.promote(second)
        await daemon.until(lambda: len(daemon.engine.started) > attempts)
        begun = len(daemon.engine.started)
        await asyncio.sleep(0.2)
        assert len(daemon.engine.started) == begun, "it rests"
        await daemon.until(lambda: len(children(daemon.home)) == 1)
        assert daemon.supervisor.routed == first, "who answered goes on"
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.supervisor.releases.setback() == "", "the release has not failed"
    await daemon.until(lambda: len(children(daemon.home)) == 1)


async def test_a_worker_that_cannot_be_recorded_does_not_run_and_is_not_lost(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "WRITE_REST_SECONDS", 0.2)
    add = Processes.add

    def fail(self: Processes, row: ProcessRow) -> None:
        if row.pid:
            raise FULL
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "add", fail)
        run = daemon.queue(sft="hang")
        await daemon.until(lambda: daemon.supervisor.runs.get(run).state == "running")
        await daemon.until(lambda: not children(daemon.home))
    (daemon.home.runs / run / "behaviour.json").write_text("{}")
    await daemon.until_state(run, "finished")
    assert daemon.events(run)[0]["event"] != "warning"


async def test_a_live_release_whose_engine_cannot_be_started_falls_back_and_stops_no_queue(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await live(daemon)
    second = await another(daemon)
    make = daemon.engine.command

    def command(release: Path, name: str, *others: Any) -> EngineCommand:
        if name == second:
            raise InvalidInput("bad_model", "cannot read config.json", "train the model again")
        return make(release, name, *others)

    monkeypatch.setattr(daemon.engine, "command", command)
    routes = len(daemon.frontage.routes)
    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.supervisor.releases.setback())
    assert daemon.supervisor.releases.live() == first
    assert "its engine does not start: it could not be started: cannot read config.json" in (
        daemon.supervisor.releases.setback()
    )
    assert daemon.frontage.routes[routes:] == []
    third = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == third)


async def test_one_that_has_answered_before_keeps_trying_and_stops_no_queue_either(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "LONGEST_REST_SECONDS", 0.05)
    first = await live(daemon)
    make = daemon.engine.command

    def command(release: Path, name: str, *others: Any) -> EngineCommand:
        if name == first:
            raise InvalidInput("bad_model", "cannot read config.json", "train the model again")
        return make(release, name, *others)

    monkeypatch.setattr(daemon.engine, "command", command)
    os.kill(daemon.pid("engine", first), signal.SIGKILL)
    await daemon.until(lambda: daemon.supervisor.routed is None)
    await daemon.until(
        lambda: any("cannot read config.json" in engine.reason for engine in daemon.supervisor.engines.shown())
    )
    second = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == second)


@pytest.mark.parametrize("stage", ["sft", "verify"])
async def test_a_damaged_file_of_a_run_stops_that_run_alone(daemon: Daemon, stage: str) -> None:
    first = await live(daemon)
    # A probe that waits gives time to damage what verify has left.
    daemon.engine.broken = {"facts-2"} if stage == "verify" else set()
    run = daemon.queue(**({"sft": "wait"} if stage == "sft" else {}))
    if stage == "sft":
        await daemon.until(lambda: daemon.starts(run))
        (daemon.home.runs / run / "sft" / "failure.json").write_text('{"code": ')
        os.kill(daemon.pid("worker", run), signal.SIGKILL)
    else:
        await daemon.until(lambda: daemon.supervisor.runs.get(run).stage == "probe")
        (daemon.home.runs / run / "verify" / "result.json").write_text('{"gates": ')
    await daemon.until_state(run, "failed")
    failed = daemon.supervisor.runs.get(run)
    assert "cannot be read" in failed.reason
    assert f"appliance stop {run} --discard" in failed.next
    os.kill(daemon.pid("engine", first), signal.SIGKILL)
    await daemon.until(lambda: daemon.supervisor.routed is None)
    await daemon.until(lambda: daemon.supervisor.routed == first)


async def test_a_worker_that_is_slow_to_die_holds_nothing_up(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "STOP_SECONDS", 0.05)
    kills: list[int] = []
    kill = processes.kill
    monkeypatch.setattr(processes, "kill", lambda row: kills.append(row.pid))
    run = daemon.queue(sft="defy")
    await daemon.until(lambda: daemon.starts(run))
    await asyncio.sleep(0.2)
    daemon.supervisor.stop(run, "pause")
    await daemon.until(lambda: kills)
    await asyncio.sleep(0.3)
    assert len(kills) == 1
    monkeypatch.setattr(workers, "KILL_AGAIN_SECONDS", 0.05)
    await daemon.until(lambda: len(kills) > 1)
    told = [event for event in daemon.events(run) if event.get("code") == "unkillable"]
    assert "does not end, though it was killed" in told[0]["message"]
    monkeypatch.setattr(processes, "kill", kill)
    await daemon.until_state(run, "stopped")


async def test_with_always_something_to_do_others_have_the_loop_too(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.die()
    ticks = 0

    async def tick(self: Supervisor) -> bool:
        nonlocal ticks
        ticks += 1
        if ticks > 1000:
            raise AssertionError("nobody else has had a turn")
        return True

    monkeypatch.setattr(Supervisor, "tick", tick)
    daemon.start()
    await asyncio.sleep(0.1)
    assert 0 < ticks < 1000


async def test_an_engine_that_does_not_end_is_told_of(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_processes, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.05)
    monkeypatch.setattr(engine_processes, "GRACE_SECONDS", 0.05)
    first = await live(daemon)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "terminate", lambda row: None)
        patch.setattr(processes.os, "kill", lambda pid, number: None)
        second = daemon.queue()
        await daemon.until(lambda: daemon.supervisor.routed == second)
        await daemon.until(
            lambda: any(
                "do not end, though they were killed" in one.reason for one in daemon.supervisor.engines.shown()
            )
        )
        assert daemon.supervisor.routed == second
    await daemon.until(lambda: daemon.running("engine") == [second])
    assert first not in daemon.running("engine")


async def test_what_the_daemon_lacks_to_ask_is_not_held_against_an_engine(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_processes, "HUNG_SECONDS", 0.2)
    first = await live(daemon)
    engine = daemon.pid("engine", first)

    async def ready(address: str) -> bool:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.engine, "ready", ready)
        await asyncio.sleep(0.5)
        assert daemon.supervisor.routed == first
        patch.setattr(daemon.engine, "ready", lambda address: asyncio.sleep(0, False))
        await daemon.until(lambda: daemon.supervisor.routed is None)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.pid("engine", first) != engine


async def test_why_an_engine_died_is_told(daemon: Daemon) -> None:
    first = await live(daemon)
    with open(daemon.supervisor.engines.log(first), "a") as log:
        log.write("CUDA error: an illegal memory access was encountered\n")
    os.kill(daemon.pid("engine", first), signal.SIGSEGV)
    await daemon.until(lambda: daemon.supervisor.engines.failures)
    (engine,) = daemon.supervisor.engines.shown()
    assert engine.restarts == 1
    assert engine.reason == (
        "crashed (SIGSEGV); its log ends with: CUDA error: an illegal memory access was encountered"
    )
    told = daemon.events(first)[-1]
    assert (told["code"], told["log"]) == (
        "engine_failed",
        ["CUDA error: an illegal memory access was encountered"],
    )


async def test_resumed_after_its_engine_did_not_start_a_run_begins_with_a_clean_count(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "LONGEST_REST_SECONDS", 0.05)
    daemon.engine.broken = {"facts-1"}
    run = daemon.queue()
    await daemon.until_state(run, "failed")
    daemon.engine.broken = set()
    daemon.supervisor.resume(run)
    await daemon.until(lambda: daemon.supervisor.routed == run)
    assert daemon.supervisor.engines.failures == {}


async def test_an_adapter_promoted_twice_at_once_is_written_once(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    go = threading.Event()

    def write(self: Unmerged, run: str, *_: object) -> None:
        written.append(run)
        go.wait(20)

    monkeypatch.setattr(Unmerged, "write", write)
    daemon.engine.adapter_rank = 64
    await live(daemon)
    run = daemon.queue(merge="wait")
    await daemon.until(lambda: daemon.running("worker") == [run] and daemon.supervisor.runs.get(run).stage == "merge")
    both = [asyncio.create_task(daemon.supervisor.promote_adapter(run)) for _ in range(2)]
    await daemon.until(lambda: written)
    await asyncio.sleep(0.1)
    go.set()
    first, second = await asyncio.gather(*both)
    assert (written, first.answers, second.answers) == ([run], True, True)


async def test_a_run_that_is_to_keep_what_it_has_learnt_is_told_so_as_soon_as_it_can_be(daemon: Daemon) -> None:
    run = daemon.queue(sft="wait")
    await daemon.until(lambda: daemon.supervisor.runs.get(run).state == "running")
    daemon.supervisor.stop(run, "keep")
    await daemon.until((daemon.home.runs / run / "sft" / "ending").exists)
    assert daemon.supervisor.runs.get(run).state == "running"
    (daemon.home.runs / run / "go").touch()
    await daemon.until_state(run, "finished")
    assert daemon.supervisor.runs.wish(run) == ""


# Directories and records that have lost each other


async def test_a_run_that_was_never_put_on_record_is_so_again(daemon: Daemon) -> None:
    await daemon.die()
    with building(daemon.home.runs / "facts-1") as directory:
        (directory / "recipe.toml").write_text(dump_recipe(RECIPE))
        (directory / "behaviour.json").write_text("{}")
    (daemon.home.runs / "notes").mkdir()
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.runs.all())
    (run,) = daemon.supervisor.runs.all()
    assert (run.id, run.state) == ("facts-1", "stopped")
    assert run.next == "`appliance resume facts-1` queues it again"
    daemon.supervisor.resume(run.id)
    await daemon.until(lambda: daemon.supervisor.routed == run.id)


def test_a_directory_that_nobody_knows_takes_no_recipe_its_name(daemon: Daemon) -> None:
    (daemon.home.runs / "facts-1").mkdir()
    (daemon.home.runs / ".facts-2.building").mkdir()
    with queueing(daemon.home, daemon.supervisor.runs, RECIPE) as (id, directory):
        (directory / "behaviour.json").write_text("{}")
    assert id == "facts-3"
    assert (daemon.home.runs / id / "recipe.toml").exists()
    assert daemon.supervisor.runs.get(id).state == "queued"


def test_a_run_that_cannot_be_put_on_record_leaves_nothing(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(Runs, "add", fail)
    with pytest.raises(sqlite3.OperationalError), queueing(daemon.home, daemon.supervisor.runs, RECIPE):
        pass
    assert list(daemon.home.runs.iterdir()) == []


async def test_a_run_whose_directory_is_gone_holds_up_no_other(daemon: Daemon) -> None:
    lost = daemon.queue(sft="wait")
    await daemon.until(lambda: daemon.starts(lost))
    await daemon.die()
    os.kill(daemon.pid("worker", lost), signal.SIGKILL)
    shutil.rmtree(daemon.home.runs / lost)
    daemon.start()
    await daemon.until_state(lost, "failed")
    assert daemon.supervisor.runs.get(lost).reason.endswith("is missing")
    next = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == next)


async def test_releases_and_their_records_find_each_other_again(daemon: Daemon) -> None:
    first = await live(daemon)
    second = await another(daemon)
    await daemon.die()
    made = json.loads((daemon.home.releases / first / "manifest.json").read_bytes())["created"]
    daemon.db.execute("DELETE FROM deployments")
    daemon.db.execute("DELETE FROM releases WHERE id = ?", (first,))
    shutil.rmtree(daemon.home.releases / second)
    daemon.start()
    await daemon.until(lambda: any(release.id == first for release in daemon.supervisor.releases.all()))
    found = daemon.supervisor.releases.get(first)
    assert (found.state, found.created) == ("verified elsewhere", made)
    assert daemon.supervisor.releases.get(second).damage == "its directory is missing"
    daemon.supervisor.promote(first)
    await daemon.until(lambda: daemon.supervisor.routed == first)


# What keeps its promise


async def test_answers_that_have_begun_end_before_their_engine_is_stopped(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await live(daemon)
    asked: list[str] = []
    ended = asyncio.Event()

    async def drained(address: str, timeout: float) -> None:
        asked.append(address)
        await ended.wait()

    monkeypatch.setattr(daemon.frontage, "drained", drained)
    address = daemon.supervisor.engines.row(first).address
    engine = psutil.Process(daemon.pid("engine", first))
    second = daemon.queue()
    await daemon.until(lambda: asked)
    assert (asked, daemon.supervisor.routed) == ([address], second)
    await asyncio.sleep(0.2)
    assert engine.is_running()
    assert engine.status() != "zombie"
    assert [one.state for one in daemon.supervisor.engines.shown() if one.release == first] == ["draining"]
    ended.set()
    await daemon.until(lambda: daemon.running("engine") == [second])


async def test_a_tick_that_fails_does_not_end_the_supervisor(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("nobody has thought of this")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.supervisor.trial, "view", fail)
        run = daemon.queue()
        await asyncio.sleep(0.2)
        assert not daemon.task.done()
        assert daemon.starts(run) == []
    await daemon.until(lambda: daemon.supervisor.routed == run)
