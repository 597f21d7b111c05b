"""Releases whose files change on the disk: what is live then, what is not, and what is read to know it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mortal_daemon import Daemon

from appliance.errors import Conflict, NotFound
from appliance.release import integrity
from appliance.store.releases import Releases
from appliance.supervisor import checks, decide

WEIGHTS = "model.safetensors"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The releases whose weights were read."""
    found: list[str] = []
    original = integrity._sha256

    def note(path: Path, reading: integrity.Reading) -> str:
        if path.name == WEIGHTS:
            found.append(path.parent.name)
        return original(path, reading)

    monkeypatch.setattr(integrity, "_sha256", note)
    return found


async def releases(daemon: Daemon, count: int) -> list[str]:
    """So many releases, of which the newest is live and answers."""
    ids = []
    for _ in range(count):
        ids.append(daemon.queue())
        await daemon.until(lambda: daemon.supervisor.routed == ids[-1])
    await daemon.until(lambda: daemon.running("engine") == ids[-1:])
    return ids


def spoil(daemon: Daemon, id: str, name: str = WEIGHTS) -> None:
    """Write over a byte of a file in place."""
    with open(daemon.home.releases / id / name, "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def truncate(daemon: Daemon, id: str) -> None:
    os.truncate(daemon.home.releases / id / WEIGHTS, 3)


def delete(daemon: Daemon, id: str) -> None:
    (daemon.home.releases / id / WEIGHTS).unlink()


def add(daemon: Daemon, id: str) -> None:
    (daemon.home.releases / id / "adapter_config.json").write_text("{}")


def spoil_the_manifest(daemon: Daemon, id: str) -> None:
    path = daemon.home.releases / id / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"reason": "it was never tried"}))


FAULTS = {
    f"{WEIGHTS} is not what its manifest says": spoil,
    f"{WEIGHTS} is missing": delete,
    "adapter_config.json is not in its manifest": add,
    "manifest.json is not the one that was recorded": spoil_the_manifest,
}


@pytest.mark.parametrize(
    ("damage", "moment"),
    list(
        zip(
            FAULTS,
            ("while it answers", "before its engine starts again", "while it answers", "while no daemon runs"),
            strict=True,
        )
    ),
)
async def test_a_live_release_that_is_damaged_gives_way_to_the_one_before(
    daemon: Daemon, caplog: pytest.LogCaptureFixture, damage: str, moment: str
) -> None:
    first, second = await releases(daemon, 2)
    if moment == "while no daemon runs":
        await daemon.die()
    FAULTS[damage](daemon, second)
    if moment == "before its engine starts again":
        os.kill(daemon.pid("engine", second), signal.SIGKILL)
    daemon.frontage.routes.clear()
    if moment == "while no daemon runs":
        daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert second not in daemon.frontage.routes, "it has not answered again"
    await daemon.until(lambda: daemon.running("engine") == [first])
    kept = daemon.supervisor.releases
    assert (kept.live(), kept.get(second).damage) == (first, damage)
    setback = kept.setback()
    assert setback.startswith(f"{second} is live no longer: it is damaged: {damage}; {first} is live instead")
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"release {second} is damaged: {damage}" in errors
    assert any(message.startswith(f"{second} is live no longer") for message in errors)


async def test_weights_cut_short_end_no_engine_again_and_again(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "LONGEST_REST_SECONDS", 0.05)
    first, second = await releases(daemon, 2)
    daemon.engine.broken = {second}
    truncate(daemon, second)
    os.kill(daemon.pid("engine", second), signal.SIGKILL)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    await asyncio.sleep(0.3)
    assert [engine.release for engine in daemon.supervisor.engines.shown()] == [first], "nor is that still shown"


async def test_with_nothing_else_whole_nobody_answers_and_it_is_said_why(daemon: Daemon) -> None:
    first, second = await releases(daemon, 2)
    await daemon.die()
    spoil(daemon, first)
    delete(daemon, second)
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.releases.live() is None)
    await daemon.until(lambda: not daemon.running("engine"))
    assert daemon.supervisor.routed is None
    assert daemon.frontage.holds[-1] is False, "and nobody waits"
    setback = daemon.supervisor.releases.setback()
    assert setback.startswith(f"{first} is live no longer: it is damaged: {WEIGHTS} is not what its manifest says")
    assert "no other verified release is whole" in setback
    await asyncio.sleep(0.2)
    assert not daemon.running("engine"), "no engine is tried on it"


async def test_the_newest_that_is_whole_comes_next_live_before_or_not(daemon: Daemon) -> None:
    (first,) = await releases(daemon, 1)
    never = daemon.queue()
    daemon.supervisor.runs.set_promotes(never, False)
    await daemon.until_state(never, "finished")
    (third,) = await releases(daemon, 1)
    spoil(daemon, third)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    spoil(daemon, first)
    await daemon.until(lambda: daemon.supervisor.routed == never)
    assert daemon.supervisor.releases.setback().startswith(f"{first} is live no longer")


async def test_whole_as_before_nothing_is_read_by_the_next_daemon(daemon: Daemon, read: list[str]) -> None:
    (first,) = await releases(daemon, 1)
    assert read == [first], "once, before it went live"
    await daemon.die()
    daemon.frontage.routes.clear()
    daemon.start()
    await daemon.until(lambda: daemon.frontage.routes == [first])
    os.kill(daemon.pid("engine", first), signal.SIGKILL)
    await daemon.until(lambda: daemon.frontage.routes == [first, None, first])
    assert read == [first]


async def test_touched_it_is_read_again_and_goes_on(daemon: Daemon, read: list[str]) -> None:
    (first,) = await releases(daemon, 1)
    engine = daemon.pid("engine", first)
    os.utime(daemon.home.releases / first / WEIGHTS)
    await daemon.until(lambda: read == [first, first])
    await daemon.until(lambda: daemon.supervisor.checks.whole(first))
    assert daemon.pid("engine", first) == engine
    assert daemon.frontage.routes == [first]


async def test_one_that_is_known_to_be_damaged_is_neither_promoted_nor_rolled_back_to(daemon: Daemon) -> None:
    first, second, _ = await releases(daemon, 3)
    spoil(daemon, second)
    assert (await daemon.supervisor.checks.settle(second, 5)).state == "damaged"
    with pytest.raises(Conflict, match=f"release {second} is damaged: {WEIGHTS} is not what"):
        daemon.supervisor.promote(second)
    assert daemon.supervisor.releases.setback() == "", "what is not live is no setback"
    assert daemon.supervisor.rollback().id == first
    await daemon.until(lambda: daemon.supervisor.routed == first)


async def test_promoted_before_its_files_were_read_it_does_not_go_live(daemon: Daemon) -> None:
    first, second = await releases(daemon, 2)
    spoil(daemon, first)
    daemon.frontage.routes.clear()
    daemon.supervisor.promote(first)
    await daemon.until(lambda: daemon.supervisor.releases.setback())
    assert daemon.supervisor.releases.live() == second
    assert f"{first} did not go live: it is damaged" in daemon.supervisor.releases.setback()
    await asyncio.sleep(0.1)
    assert daemon.frontage.routes == []
    assert daemon.running("engine") == [second]


async def test_mended_and_checked_by_hand_it_can_be_promoted_again(daemon: Daemon) -> None:
    first, second = await releases(daemon, 2)
    whole = (daemon.home.releases / second / WEIGHTS).read_bytes()
    spoil(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    (daemon.home.releases / second / WEIGHTS).write_bytes(whole)
    daemon.supervisor.checks.start(second, thorough=True)
    await daemon.until(lambda: not daemon.supervisor.releases.get(second).damage)
    assert daemon.supervisor.releases.live() == first, "a check changes nothing but what is known"
    daemon.supervisor.promote(second)
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.supervisor.releases.setback() == ""


async def test_bits_that_change_without_a_trace_are_found_by_hand(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await releases(daemon, 2)
    stamps = integrity.stamps(daemon.home.releases / second)
    spoil(daemon, second)
    original = integrity.stamps
    monkeypatch.setattr(integrity, "stamps", lambda folder: stamps if folder.name == second else original(folder))
    await asyncio.sleep(0.1)
    assert daemon.supervisor.routed == second
    daemon.supervisor.checks.start(second, thorough=True)
    await daemon.until(lambda: daemon.supervisor.routed == first)


async def test_a_new_run_is_not_compared_with_a_damaged_live_release(daemon: Daemon) -> None:
    first, second = await releases(daemon, 2)
    await daemon.die()
    spoil(daemon, second)
    run = daemon.queue(sft="wait")
    daemon.start()
    (daemon.home.runs / run / "go").touch()
    await daemon.until_state(run, "finished")
    assert (daemon.home.runs / run / "verify" / "live.txt").read_text() == first
    delete(daemon, run)
    delete(daemon, first)
    await daemon.until(lambda: daemon.supervisor.releases.live() is None)
    alone = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == alone)
    assert (daemon.home.runs / alone / "verify" / "live.txt").read_text() == ""


async def test_a_canary_that_is_damaged_goes_back(daemon: Daemon) -> None:
    first, second = await releases(daemon, 2)
    daemon.supervisor.rollback()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    daemon.supervisor.start_canary(second, 0.1)
    await daemon.until(lambda: daemon.frontage.canaries[-1:] == [(second, 0.1)])
    spoil(daemon, second)
    await daemon.until(lambda: daemon.frontage.canaries[-1] is None)
    ended = daemon.supervisor.trial.newest()[second]
    assert (ended.outcome, ended.reason) == (
        "rolled back",
        f"it is damaged: {WEIGHTS} is not what its manifest says",
    )
    await daemon.until(lambda: daemon.running("engine") == [first])


STEPS: dict[str, tuple[type, str]] = {
    "before it is read": (checks.Checks, "_examine"),
    "before the damage is recorded": (Releases, "found_damaged"),
    "before the other one is live": (Releases, "give_way"),
}


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_any_step_the_other_one_is_live_in_the_end(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first, second = await releases(daemon, 2)
    reached = asyncio.Event()
    owner, name = STEPS[step]

    def die(*_: object) -> None:
        reached.set()
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        spoil(daemon, second)
        await asyncio.wait_for(reached.wait(), 10)
        await daemon.die()
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.supervisor.releases.live() == first
    assert daemon.supervisor.releases.setback().startswith(f"{second} is live no longer")


async def test_what_this_process_cannot_look_at_is_not_called_damaged(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "RETRY_SECONDS", 0.02)
    (first,) = await releases(daemon, 1)
    lack = OSError(24, "Too many open files")
    tried = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise lack

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "_sha256", fail)
        os.utime(daemon.home.releases / first / WEIGHTS)
        await daemon.until(lambda: len(tried) > 2)
        assert daemon.supervisor.routed == first
    await daemon.until(lambda: daemon.supervisor.checks.whole(first))
    assert daemon.supervisor.releases.get(first).damage == ""
    with monkeypatch.context() as patch:
        patch.setattr(integrity.os, "scandir", fail)
        assert daemon.supervisor.checks.whole(first), "nothing speaks against it"


async def test_a_release_of_before_manifests_were_recorded_is_taken_as_it_is(daemon: Daemon) -> None:
    (first,) = await releases(daemon, 1)
    await daemon.die()
    forget: sqlite3.Connection = daemon.db
    forget.execute("UPDATE releases SET manifest_sha256 = '', seen = '{}'")
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.releases.proof(first).manifest_sha256)
    spoil_the_manifest(daemon, first)
    await daemon.until(lambda: daemon.supervisor.releases.live() is None)


async def test_removed_while_it_is_read_nothing_is_said_of_it(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = await releases(daemon, 2)
    daemon.supervisor.checks.start(first, thorough=True)
    daemon.supervisor.releases.remove(first)
    await daemon.until(lambda: first not in daemon.supervisor.checks.under_way)
    with pytest.raises(NotFound):
        daemon.supervisor.checks.view(first)


async def test_a_check_by_hand_takes_the_place_of_a_lesser_one(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = await releases(daemon, 1)
    how: list[bool] = []
    original: Callable[..., integrity.Examination] = integrity.examine

    def note(folder: Path, digest: str, seen: object, reading: integrity.Reading) -> integrity.Examination:
        how.append(reading.from_disk)
        return original(folder, digest, seen, reading)

    monkeypatch.setattr(checks, "examine", note)
    daemon.supervisor.checks.start(first)
    waiting = asyncio.create_task(daemon.supervisor.checks.settle(first, 5))
    await asyncio.sleep(0)
    daemon.supervisor.checks.start(first, thorough=True)
    daemon.supervisor.checks.start(first)
    assert (await waiting).release == first, "who waits for the lesser one is not ended with it"
    assert (await daemon.supervisor.checks.settle(first, 5)).state == "whole"
    assert how[-1] is True
    assert daemon.supervisor.checks.under_way == frozenset()


async def test_what_is_to_answer_does_not_wait_for_checks_by_hand(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await releases(daemon, 2)
    go = threading.Event()
    by_hand: list[str] = []
    original: Callable[..., integrity.Examination] = integrity.examine

    def slow(folder: Path, digest: str, seen: object, reading: integrity.Reading) -> integrity.Examination:
        if reading.from_disk:
            by_hand.append(folder.name)
            go.wait(20)
        return original(folder, digest, seen, reading)

    monkeypatch.setattr(checks, "examine", slow)
    for release in (first, second):
        daemon.supervisor.checks.start(release, thorough=True)
    daemon.supervisor.promote(daemon.supervisor.releases.before() or "")
    await daemon.until(lambda: daemon.supervisor.routed == first)
    third = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == third)
    assert by_hand == [first], "of which there is one at a time"
    go.set()
    await daemon.until(lambda: by_hand == [first, second])
