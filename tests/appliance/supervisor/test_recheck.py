"""A run that repeats the gates of a release: what it says of the release, and that it makes none itself."""

from __future__ import annotations

import asyncio

import pytest
from mortal_daemon import RECIPE, Daemon
from test_foreign import arrive

from appliance.store.releases import Releases
from appliance.train.recipe import Given, Recipe


def recheck(daemon: Daemon, release: str, **behaviour: str) -> str:
    """Such a run in the queue, whose stages end as `behaviour` says."""
    recipe = Recipe(name=f"{release}-gates", base="tiny", given=Given(sha256="0", dataset="d1"), rechecks=release)
    return daemon.queue(recipe, **behaviour)


async def test_a_release_from_elsewhere_that_passes_here_is_verified(daemon: Daemon) -> None:
    imported = arrive(daemon, "imported")
    run = recheck(daemon, imported)
    await daemon.until_state(run, "finished")
    assert daemon.starts(run) == ["merge", "verify"]
    assert daemon.supervisor.runs.get(run).reason == ""
    release = daemon.supervisor.releases.get(imported)
    assert (release.state, release.note) == ("verified", "repeated here, all 5 gates passed")
    assert [one.id for one in daemon.supervisor.releases.all()] == [imported], "and there is no other release"
    assert {event["gate"] for event in daemon.events(run) if event["event"] == "gate"} == {"parity", "stopping"}
    daemon.engine.probed.clear()
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.routed == imported)
    assert daemon.engine.probed == [], "it has nothing left to repeat"


@pytest.mark.parametrize("fault", ["refuse", "ruin", "parity"])
async def test_a_live_release_that_does_not_pass_again_is_refused_and_gives_way(daemon: Daemon, fault: str) -> None:
    first = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    second = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == second)
    if fault == "parity":
        daemon.engine.token_ids = [1, 3]
    run = recheck(daemon, second, **({} if fault == "parity" else {"verify": fault}))
    await daemon.until_state(run, "finished")
    assert f"{second} did not pass again" in daemon.supervisor.runs.get(run).reason
    await daemon.until(lambda: daemon.supervisor.routed == first)
    release = daemon.supervisor.releases.get(second)
    measured = {"structure", "fidelity", "quality"} | ({"parity", "stopping"} if fault == "parity" else set())
    assert (release.state, release.gates.keys()) == ("refused", measured)
    assert not release.gates["parity" if fault == "parity" else "fidelity"]
    assert f"{second} is live no longer: it was refused: repeated here, " in daemon.supervisor.releases.setback()


async def test_one_that_was_refused_and_passes_again_is_what_it_was(daemon: Daemon) -> None:
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    before = daemon.supervisor.releases.get(own)
    await daemon.until_state(recheck(daemon, own, verify="refuse"), "finished")
    assert daemon.supervisor.releases.get(own).state == "refused"
    await daemon.until_state(recheck(daemon, own), "finished")
    after = daemon.supervisor.releases.get(own)
    assert (after.state, after.reason, after.gates) == (before.state, before.reason, before.gates)


@pytest.mark.parametrize("live", [False, True])
async def test_files_that_change_while_its_gates_are_repeated_are_no_verdict(daemon: Daemon, live: bool) -> None:
    own = daemon.queue(RECIPE.model_copy(update={"promote": live}))
    await daemon.until_state(own, "finished")
    assert (await daemon.supervisor.checks.settle(own, 5)).state == "whole"
    run = recheck(daemon, own, verify="wait")
    await daemon.until(lambda: daemon.starts(run) == ["merge", "verify"])
    (daemon.home.releases / own / "model.safetensors").write_bytes(b"other weights")
    (daemon.home.runs / run / "go").touch()
    await daemon.until_state(run, "failed")
    assert "something has written to the files" in daemon.supervisor.runs.get(run).reason
    release = daemon.supervisor.releases.get(own)
    assert (release.state, bool(release.damage)) == ("verified", live), "of the live one it has been found"


async def test_worse_than_what_is_live_it_stays_what_it_was(daemon: Daemon) -> None:
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    imported = arrive(daemon, "imported")
    for release, state in ((imported, "verified elsewhere"), (own, "verified")):
        run = recheck(daemon, release, verify="worse")
        await daemon.until_state(run, "finished")
        assert "did not pass again: quality" in daemon.supervisor.runs.get(run).reason
        found = daemon.supervisor.releases.get(release)
        assert found.state == state
        assert found.note.startswith("repeated here, quality")
        compared_with = (daemon.home.runs / run / "verify" / "live.txt").read_text()
        assert compared_with == ("" if release == own else own), "a release is not compared with itself"
    assert daemon.supervisor.releases.live() == own


async def test_killed_before_it_is_said_it_is_said_by_the_next_daemon(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = arrive(daemon, "imported")
    reached = asyncio.Event()

    def die(*_: object, **__: object) -> None:
        reached.set()
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(Releases, "passed_here", die)
        run = recheck(daemon, imported)
        await asyncio.wait_for(reached.wait(), 10)
        await daemon.die()
    daemon.start()
    await daemon.until_state(run, "finished")
    assert daemon.supervisor.releases.get(imported).state == "verified"
