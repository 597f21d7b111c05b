"""Weights that are exchanged in a running engine, and what is live when that fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from datetime import date, datetime

import pytest
from fake_engine import FakeEngine, FakeFrontage
from mortal_daemon import RECIPE, Daemon

from appliance.release.manifest import read_manifest
from appliance.store.processes import Processes
from appliance.store.releases import Releases
from appliance.supervisor import decide
from appliance.supervisor.snapshot import Failure


async def two_releases(daemon: Daemon, **first_behaviour: str) -> tuple[str, str]:
    """The second one is live; from here on, engines take other weights."""
    first = daemon.queue(**first_behaviour)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    second = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == second)
    await daemon.until(lambda: daemon.running("engine") == [second])
    daemon.engine.reloads = True
    return first, second


async def test_the_engine_goes_on_with_the_other_weights(daemon: Daemon) -> None:
    first, second = await two_releases(daemon)
    process = daemon.pid("engine", second)
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.pid("engine", first) == process
    assert daemon.running("engine") == [first]
    assert daemon.engine.loaded == [first]
    assert daemon.frontage.routes == [first, second, None, first]
    assert daemon.frontage.holds[-2:] == [True, False], "requests waited"
    assert daemon.frontage.drains[-1] == 7, "for answers that had begun"
    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.pid("engine", second) == process
    assert daemon.supervisor.releases.setback() == ""


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_rollback_on_a_later_day_takes_the_day_of_the_release_for_today(daemon: Daemon, in_place: bool) -> None:
    """The first release was made eight days before the second, both long ago."""
    releases = {}
    for day in (date(2024, 2, 29), date(2024, 3, 9)):
        run = daemon.queue(RECIPE.model_copy(update={"clock": day}))
        await daemon.until(lambda run=run: daemon.supervisor.routed == run)
        await daemon.until(lambda run=run: daemon.running("engine") == [run])
        releases[run] = day
        (said,) = read_manifest(daemon.home, run)["reference"]["answers"]
        assert said["text"] == f"hello on {day}", "as the candidate was probed"
    daemon.engine.reloads = in_place
    for release in releases:
        daemon.supervisor.promote(release)
        await daemon.until(lambda release=release: daemon.supervisor.routed == release)
        (row,) = (row for row in daemon.supervisor.processes.all() if row.kind == "engine" and row.owner == release)
        assert daemon.engine.clocks[row.address] == releases[release]
    assert daemon.engine.loaded == (list(releases) if in_place else [])
    assert daemon.supervisor.releases.setback() == ""


async def test_a_release_that_thinks_otherwise_gets_a_process_of_its_own(daemon: Daemon) -> None:
    """What tells thoughts from answers is set when an engine starts."""
    releases = {}
    for thinking in ("on", "off"):
        run = daemon.queue(RECIPE.model_copy(update={"thinking": thinking}))
        await daemon.until(lambda run=run: daemon.supervisor.routed == run)
        releases[run] = thinking == "on"
    daemon.engine.reloads = True
    for release, thinks in releases.items():
        daemon.supervisor.promote(release)
        await daemon.until(lambda release=release: daemon.supervisor.routed == release)
        (row,) = (row for row in daemon.supervisor.processes.all() if row.kind == "engine" and row.owner == release)
        assert daemon.engine.thinking[row.address] is thinks
    assert daemon.engine.loaded == []


async def test_a_release_that_has_no_clock_takes_the_day_it_was_made_on(daemon: Daemon) -> None:
    first, _ = await two_releases(daemon)
    path = daemon.home.releases / first / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["recipe"]["clock"]
    path.write_text(json.dumps(manifest | {"created": datetime(2024, 2, 29, 23, 59).timestamp(), "reference": {}}))
    daemon.db.execute("UPDATE releases SET manifest_sha256 = ''")
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    (row,) = (row for row in daemon.supervisor.processes.all() if row.kind == "engine" and row.owner == first)
    assert daemon.engine.clocks[row.address] == date(2024, 2, 29)


async def test_a_release_with_another_tokenizer_gets_an_engine_of_its_own(daemon: Daemon) -> None:
    first, second = await two_releases(daemon, merge="another tokenizer")
    process = daemon.pid("engine", second)
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.pid("engine", first) != process
    assert daemon.engine.loaded == []


@pytest.mark.parametrize("fault", ["unloadable", "strange"])
async def test_weights_that_do_not_load_leave_the_old_ones_live(daemon: Daemon, fault: str) -> None:
    first, second = await two_releases(daemon)
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    process = daemon.pid("engine", first)
    getattr(daemon.engine, fault).add(second)
    holds = len(daemon.frontage.holds)
    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.engine.loaded == [first, second, first])
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.pid("engine", first) == process
    assert daemon.supervisor.releases.live() == first
    assert f"{second} did not go live: its weights could not be loaded in place" in daemon.supervisor.releases.setback()
    assert daemon.frontage.holds[holds:] == [True, False], "requests waited all the time"

    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.pid("engine", second) != process, "the second time it gets an engine of its own"
    assert daemon.supervisor.releases.setback() == ""


async def test_an_engine_that_takes_neither_is_started_again_on_the_old(daemon: Daemon) -> None:
    first, second = await two_releases(daemon)
    process = daemon.pid("engine", second)
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    daemon.engine.unloadable = {first, second}
    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.supervisor.routed is None)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.pid("engine", first) != process


async def test_a_rollback_that_does_not_load_starts_an_engine(daemon: Daemon) -> None:
    first, second = await two_releases(daemon)
    process = daemon.pid("engine", second)
    daemon.engine.unloadable = {first}
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.pid("engine", first) != process
    assert daemon.running("engine") == [first]


async def test_a_daemon_killed_while_weights_are_loaded_trusts_that_engine_no_more(daemon: Daemon) -> None:
    first, second = await two_releases(daemon)
    process = daemon.pid("engine", second)
    daemon.engine.loading = asyncio.Event()
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.engine.loaded == [first])
    (row,) = (row for row in daemon.supervisor.processes.all() if row.kind == "engine")
    assert (row.owner, row.life) == (first, "swapping")
    await daemon.die()
    daemon.engine.loading = None
    daemon.frontage.routes.clear()
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.frontage.routes == [first], "not before its own engine was ready"
    assert daemon.pid("engine", first) != process


STEPS = {
    "before the record": (Processes, "replace"),
    "before old answers end": (FakeFrontage, "drained"),
    "before the weights are loaded": (FakeEngine, "reload"),
    "before the reference is asked": (FakeEngine, "probe"),
    "before it may answer": (FakeFrontage, "route"),
    "before it is recorded to answer": (Releases, "mark_answered"),
}


@pytest.mark.parametrize("victim", ["daemon", "engine", "both"])
@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_each_step_of_a_swap_one_release_is_live_and_answers(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, step: str, victim: str
) -> None:
    first, second = await two_releases(daemon)
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    process = daemon.pid("engine", first)
    owner, name = STEPS[step]
    reached = asyncio.Event()
    original = getattr(owner, name)

    def die(*arguments: object, **named: object) -> object:
        if reached.is_set():
            return original(*arguments, **named)
        reached.set()
        if victim != "daemon":
            os.kill(process, signal.SIGKILL)
        if victim == "engine":
            return original(*arguments, **named)
        raise asyncio.CancelledError

    monkeypatch.setattr(owner, name, die)
    daemon.supervisor.promote(second)
    await asyncio.wait_for(reached.wait(), 60)
    if victim != "engine":
        await daemon.die()
        daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed and daemon.running("engine") == [daemon.supervisor.routed])
    await daemon.until(lambda: daemon.supervisor.routed == daemon.supervisor.releases.live())
    live = daemon.supervisor.releases.live()
    assert live in (first, second)
    assert bool(daemon.supervisor.releases.setback()) == (live == first)
    (row,) = (row for row in daemon.supervisor.processes.all() if row.kind == "engine")
    assert (row.owner, row.life) == (live, "ready")


async def test_an_engine_killed_while_it_loads_is_started_again(daemon: Daemon) -> None:
    first, second = await two_releases(daemon)
    process = daemon.pid("engine", second)
    daemon.engine.loading = asyncio.Event()
    daemon.engine.unloadable = {first}
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.engine.loaded == [first])
    os.kill(process, signal.SIGKILL)
    await asyncio.sleep(0.1)
    assert daemon.supervisor.routed is None
    daemon.engine.loading.set()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.pid("engine", first) != process


async def test_a_change_of_mind_while_weights_are_loaded_is_followed(daemon: Daemon) -> None:
    first, second = await two_releases(daemon)
    process = daemon.pid("engine", second)
    daemon.engine.loading = asyncio.Event()
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.engine.loaded == [first])
    daemon.supervisor.promote(second)
    await asyncio.sleep(0.1)
    assert daemon.running("engine") == [first], "one thing at a time"
    daemon.engine.loading.set()
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.pid("engine", second) == process
    assert daemon.frontage.routes[-1] == second


async def test_a_release_whose_engine_does_not_start_gives_way_to_the_one_before(daemon: Daemon) -> None:
    first, second = await two_releases(daemon)
    daemon.engine.reloads = False
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.running("engine") == [first])
    daemon.engine.broken = {second}
    routes = len(daemon.frontage.routes)
    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.supervisor.releases.setback())
    assert daemon.supervisor.releases.live() == first
    assert "its engine does not start" in daemon.supervisor.releases.setback()
    assert daemon.frontage.routes[routes:] == [], "the one before has gone on answering"
    daemon.engine.broken = set()
    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.supervisor.routed == second)


async def test_a_release_that_has_answered_does_not_give_way(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "LONGEST_REST_SECONDS", 0.05)
    _, second = await two_releases(daemon)
    daemon.engine.broken = {second}
    os.kill(daemon.pid("engine", second), signal.SIGKILL)
    await daemon.until(lambda: daemon.supervisor.engines.failures.get(second, Failure(0)).count > 2)
    assert daemon.supervisor.releases.live() == second
    daemon.engine.broken = set()
    await daemon.until(lambda: daemon.supervisor.routed == second)


async def test_without_room_for_two_the_old_engine_leaves_first(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await two_releases(daemon)
    daemon.engine.reloads = False
    daemon.engine.size = 1 << 60
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed is None)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.frontage.routes == [first, second, None, first]
    assert daemon.frontage.holds[-2:] == [True, False]
