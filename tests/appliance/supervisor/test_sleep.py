"""An engine that sleeps while a worker has the GPU: the whole way round, and what is done where it does not work."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mortal_daemon import RECIPE, Daemon

from appliance.errors import InvalidInput
from appliance.store.processes import ProcessRow
from appliance.supervisor import processes, sleep
from appliance.supervisor.engines import EngineCommand
from appliance.supervisor.snapshot import Failure

MEMORY = 1600
AWAKE = 1400
KEPT = 50
UNPROMOTED = RECIPE.model_copy(update={"promote": False})
ADAPTER = RECIPE.model_copy(update={"promote": False, "end": "adapter"})


class Card:
    """A GPU on which engines have memory, more or less of it as they sleep."""

    def __init__(self, daemon: Daemon) -> None:
        self.kept = KEPT
        self.lingers = 0
        """What the driver has not yet taken back of a process that has ended."""
        self._daemon = daemon

    def taken(self, row: ProcessRow) -> int:
        if not processes.alive(row):
            return 0
        return self.kept if row.address in self._daemon.engine.asleep else AWAKE

    def free(self) -> int:
        return MEMORY - self.lingers - sum(self.taken(row) for row in self._daemon.supervisor.engines.rows())

    def held_by(self, pids: set[int]) -> int:
        return sum(self.taken(row) for row in self._daemon.supervisor.engines.rows() if row.pid in pids)


@pytest.fixture
def card(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Card:
    """That of a daemon with the exclusive lease, whose engine can sleep."""
    daemon.exclusive = daemon.supervisor.exclusive = True
    daemon.engine.sleeps = daemon.engine.reloads = True
    card = Card(daemon)
    monkeypatch.setattr("appliance.hardware.free_memory", card.free)
    monkeypatch.setattr("appliance.hardware.held_by", card.held_by)
    monkeypatch.setattr("appliance.hardware.total_memory", lambda: MEMORY)
    monkeypatch.setattr(sleep, "LOOK_SECONDS", 0.01)
    return card


@pytest.fixture
async def live(daemon: Daemon, card: Card) -> str:
    """A release that answers."""
    run = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    daemon.frontage.routes.clear()
    return run


async def until_trained_beside(daemon: Daemon, run: str, engines: list[str]) -> None:
    """Wait for the worker of the run, which has begun beside these engines."""
    await daemon.until(lambda: daemon.starts(run))
    assert daemon.running("engine") == engines


def finish(daemon: Daemon, run: str) -> None:
    (daemon.home.runs / run / "go").touch()


async def test_the_engine_sleeps_for_the_worker_and_wakes_as_the_new_release(daemon: Daemon, live: str) -> None:
    process = daemon.pid("engine", live)
    second = daemon.queue(sft="wait")
    await until_trained_beside(daemon, second, [live])
    (engine,) = daemon.supervisor.engines.shown()
    assert (engine.state, engine.release, engine.pid) == ("sleeping", live, process)
    assert daemon.frontage.routes == [None], "nobody is sent to it"
    assert daemon.frontage.drains[-1] == 7, "and answers that had begun could end"
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.supervisor.releases.get(second).state == "verified"
    assert daemon.pid("engine", second) == process
    assert daemon.running("engine") == [second]
    assert daemon.engine.loaded == [second], "once, for the probe and for what it then serves"
    assert daemon.engine.probed[-1] == second
    assert daemon.frontage.routes == [None, second]


async def test_it_answers_as_before_where_the_new_release_does_not_go_live(daemon: Daemon, live: str) -> None:
    process = daemon.pid("engine", live)
    second = daemon.queue(UNPROMOTED)
    await daemon.until_state(second, "finished")
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.pid("engine", live) == process
    assert daemon.engine.loaded == [second, live]
    assert daemon.supervisor.releases.get(second).state == "verified"


@pytest.mark.parametrize("ends", ["as an adapter", "refused by verify", "stopped", "failed"])
async def test_it_wakes_on_its_own_weights_where_there_are_no_others(daemon: Daemon, live: str, ends: str) -> None:
    process, probed = daemon.pid("engine", live), len(daemon.engine.probed)
    verify = "ruin" if ends == "refused by verify" else "done"
    second = daemon.queue(ADAPTER if ends == "as an adapter" else UNPROMOTED, sft="wait", verify=verify)
    if ends == "failed":
        (daemon.home.runs / second / "behaviour.json").write_text('{"sft": "fail"}')
    await until_trained_beside(daemon, second, [live])
    if ends == "stopped":
        daemon.supervisor.runs.mark_stopping(second)
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.pid("engine", live) == process
    assert daemon.engine.loaded == [live]
    assert daemon.engine.probed[probed:] == [live], "it was asked what it had said when it was verified"
    assert daemon.frontage.holds[-2:] == [True, False], "requests waited for it to wake"
    assert daemon.supervisor.engines.failures == {}


async def test_one_run_after_the_other_it_sleeps_on(daemon: Daemon, live: str) -> None:
    process = daemon.pid("engine", live)
    runs = [daemon.queue(ADAPTER, sft="wait"), daemon.queue(ADAPTER)]
    await until_trained_beside(daemon, runs[0], [live])
    finish(daemon, runs[0])
    await daemon.until_state(runs[1], "finished")
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.pid("engine", live) == process
    assert daemon.engine.loaded == [live]


@pytest.mark.parametrize("fault", ["dead", "refuses", "odd", "hangs", "keeps", "killed"])
async def test_one_that_does_not_sleep_is_stopped(
    daemon: Daemon, live: str, card: Card, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    faults = {"dead": ConnectionError("gone"), "refuses": InvalidInput("no", "no", ""), "odd": KeyError("asleep")}
    daemon.engine.insomnia = faults.get(fault)
    if fault in ("hangs", "killed"):
        daemon.engine.falling_asleep = asyncio.Event()
    if fault == "keeps":
        card.kept = MEMORY // sleep.KEPT_SHARE + 1
    monkeypatch.setattr(sleep, "FREE_SECONDS" if fault == "keeps" else "SLEEP_SECONDS", 0.2)
    process = daemon.pid("engine", live)
    second = daemon.queue(ADAPTER, sft="wait")
    if fault == "killed":
        await daemon.until(lambda: daemon.supervisor.engines.shown()[0].state == "draining")
        os.kill(process, signal.SIGKILL)
        daemon.engine.insomnia = ConnectionError("it is gone")
        assert daemon.engine.falling_asleep
        daemon.engine.falling_asleep.set()
    await until_trained_beside(daemon, second, [])
    assert card.free() == MEMORY
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.pid("engine", live) != process
    assert daemon.supervisor.engines.failures == {}, "nothing is wrong with the release"
    assert daemon.engine.loaded == []


@pytest.mark.parametrize("teller", ["free_memory", "held_by"])
async def test_the_worker_waits_until_the_memory_is_seen_to_be_free(
    daemon: Daemon, live: str, card: Card, monkeypatch: pytest.MonkeyPatch, teller: str
) -> None:
    """By the driver's figure for the card or for the process, where it tells only one of them well."""
    other = {"held_by": ("free_memory", lambda: MEMORY), "free_memory": ("held_by", lambda pids: 0)}
    name, blind = other[teller]
    monkeypatch.setattr(f"appliance.hardware.{name}", blind)
    card.kept = AWAKE
    second = daemon.queue(ADAPTER)
    await daemon.until(lambda: daemon.engine.asleep)
    await asyncio.sleep(0.2)
    assert daemon.starts(second) == []
    card.kept = KEPT
    await until_trained_beside(daemon, second, [live])


async def test_it_does_not_wake_before_the_workers_memory_is_free(daemon: Daemon, live: str, card: Card) -> None:
    second = daemon.queue(ADAPTER, sft="wait")
    await until_trained_beside(daemon, second, [live])
    card.lingers = AWAKE
    finish(daemon, second)
    await daemon.until_state(second, "finished")
    await asyncio.sleep(0.2)
    assert daemon.engine.loaded == []
    card.lingers = 0
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.engine.loaded == [live]


async def test_one_that_dies_asleep_is_started_anew_after_the_worker(daemon: Daemon, live: str) -> None:
    process = daemon.pid("engine", live)
    second = daemon.queue(ADAPTER, sft="wait")
    await until_trained_beside(daemon, second, [live])
    os.kill(process, signal.SIGKILL)
    await daemon.until(lambda: daemon.running("engine") == [])
    assert daemon.running("worker") == [second], "which goes on"
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.pid("engine", live) != process
    assert daemon.supervisor.engines.failures == {}


@pytest.mark.parametrize(
    ("fault", "new"),
    [("unloadable", True), ("killed", True), ("unloadable", False), ("strange", False), ("killed", False)],
)
async def test_one_that_does_not_wake_is_started_anew(daemon: Daemon, live: str, fault: str, new: bool) -> None:
    process = daemon.pid("engine", live)
    second = daemon.queue(RECIPE if new else ADAPTER, sft="wait")
    wanted = second if new else live
    await until_trained_beside(daemon, second, [live])
    daemon.engine.unloadable = {wanted} if fault in ("unloadable", "killed") else set()
    daemon.engine.strange = {wanted} if fault == "strange" else set()
    if fault == "killed":
        daemon.engine.loading = asyncio.Event()
    finish(daemon, second)
    await daemon.until(lambda: daemon.engine.loaded == [wanted])
    if daemon.engine.loading:
        os.kill(process, signal.SIGKILL)
        daemon.engine.loading.set()
    daemon.engine.strange = set()
    await daemon.until(lambda: daemon.supervisor.routed == wanted)
    assert daemon.pid("engine", wanted) != process
    assert daemon.engine.loaded == [wanted], "nor is it tried on the weights before"
    assert daemon.supervisor.releases.live() == wanted
    assert daemon.supervisor.releases.setback() == ""
    assert daemon.supervisor.engines.failures == {}


async def test_a_promotion_by_hand_meanwhile_is_not_given_up_where_it_does_not_wake(daemon: Daemon, live: str) -> None:
    second = daemon.queue(UNPROMOTED)
    await daemon.until_state(second, "finished")
    await daemon.until(lambda: daemon.supervisor.routed == live)
    third = daemon.queue(ADAPTER, sft="wait")
    await until_trained_beside(daemon, third, [live])
    daemon.supervisor.promote(second)
    daemon.engine.unloadable = {second}
    finish(daemon, third)
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.supervisor.releases.setback() == ""


async def test_a_candidate_is_not_refused_for_what_an_engine_says_that_has_slept(daemon: Daemon, live: str) -> None:
    process = daemon.pid("engine", live)
    daemon.engine.muddled = True
    second = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.engine.loaded == [second]
    assert daemon.pid("engine", second) != process, "it was asked in a process of its own"
    assert daemon.supervisor.releases.get(second).state == "verified"


async def test_where_none_starts_that_could_sleep_the_next_is_started_as_one_that_cannot(
    daemon: Daemon, card: Card
) -> None:
    """Whatever keeps vLLM's sleep from a card must not keep vLLM from it."""
    seen: list[bool] = []
    make = daemon.engine.command

    def command(release: Path, name: str, socket: Path, *others: Any) -> EngineCommand:
        seen.append(daemon.engine.sleeps)
        daemon.engine.broken = {name} if daemon.engine.sleeps else set()
        return make(release, name, socket, *others)

    daemon.engine.command = command  # type: ignore[method-assign]
    run = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    assert seen == [True, False]


async def test_an_engine_that_another_daemon_started_says_nothing_of_that(daemon: Daemon, card: Card) -> None:
    make = daemon.engine.command

    def command(release: Path, name: str, socket: Path, *others: Any) -> EngineCommand:
        daemon.engine.broken = {name} if daemon.engine.sleeps else set()
        return make(release, name, socket, *others)

    daemon.engine.command = command  # type: ignore[method-assign]
    run = daemon.queue(ADAPTER.model_copy(update={"promote": True, "end": "release"}))
    await daemon.until(lambda: daemon.supervisor.routed == run)
    await daemon.die()
    daemon.engine.sleeps = True
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    second = daemon.queue(ADAPTER)
    await daemon.until_state(second, "finished")
    await daemon.until(lambda: daemon.supervisor.routed == run)
    assert not daemon.engine.sleeps


async def test_memory_that_the_driver_takes_back_late_is_not_taken_for_kept(
    daemon: Daemon, card: Card, live: str
) -> None:
    """The most that was free when an engine was started counts, whichever that was."""
    card.lingers = 500
    daemon.supervisor.engines._sleep.before_start()
    card.lingers = 0
    assert daemon.supervisor.engines._sleep._missing() == AWAKE


async def test_one_that_has_started_before_is_not_doubted_for_a_failure(daemon: Daemon, live: str) -> None:
    process = daemon.pid("engine", live)
    os.kill(process, signal.SIGKILL)
    await daemon.until(lambda: daemon.supervisor.engines.failures.get(live, Failure(0)).count == 1)
    assert daemon.engine.sleeps


async def test_but_for_what_its_own_says(daemon: Daemon, live: str) -> None:
    daemon.engine.token_ids = [1, 3]
    second = daemon.queue()
    await daemon.until_state(second, "finished")
    assert daemon.supervisor.releases.get(second).state == "refused"
    assert daemon.engine.probed.count(second) == 2


async def test_a_candidate_with_another_tokenizer_gets_an_engine_of_its_own(daemon: Daemon, live: str) -> None:
    process = daemon.pid("engine", live)
    second = daemon.queue(sft="wait", merge="another tokenizer")
    await until_trained_beside(daemon, second, [live])
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == second)
    assert daemon.pid("engine", second) != process
    assert daemon.engine.loaded == []


async def test_a_release_whose_answers_are_not_on_record_is_not_woken_on_trust(daemon: Daemon, live: str) -> None:
    daemon.engine.name = "another"
    process = daemon.pid("engine", live)
    second = daemon.queue(ADAPTER, sft="wait")
    await until_trained_beside(daemon, second, [live])
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.pid("engine", live) != process
    assert daemon.engine.loaded == []


async def test_a_stage_that_runs_out_of_memory_is_tried_again_with_all_of_it(daemon: Daemon, live: str) -> None:
    second = daemon.queue(sft="short of memory once", merge="wait")
    await daemon.until(lambda: "merge" in daemon.starts(second))
    assert daemon.starts(second) == ["sft", "sft", "merge"]
    assert daemon.running("engine") == []
    assert [event["code"] for event in daemon.events(second) if event["event"] == "warning"] == ["crowded"]
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == second)


@pytest.mark.parametrize("when", ["falling asleep", "asleep", "waking"])
async def test_the_next_daemon_stops_what_sleeps(daemon: Daemon, live: str, when: str) -> None:
    process = daemon.pid("engine", live)
    if when == "falling asleep":
        daemon.engine.falling_asleep = asyncio.Event()
    second = daemon.queue(ADAPTER, sft="wait")
    if when == "falling asleep":
        await daemon.until(lambda: daemon.supervisor.engines.shown()[0].state == "draining")
    else:
        await until_trained_beside(daemon, second, [live])
    if when == "waking":
        daemon.engine.loading = asyncio.Event()
        finish(daemon, second)
        await daemon.until(lambda: daemon.engine.loaded == [live])
    else:
        (row,) = daemon.supervisor.engines.rows()
        assert row.life == ("draining" if when == "falling asleep" else "sleeping")
    await daemon.die()
    daemon.engine.loading = daemon.engine.falling_asleep = None
    daemon.start()
    await daemon.until(lambda: process not in [row.pid for row in daemon.supervisor.engines.rows()])
    assert daemon.supervisor.routed is None
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert daemon.pid("engine", live) != process


async def test_an_engine_that_another_daemon_started_is_stopped_for_a_worker(daemon: Daemon, live: str) -> None:
    """Nobody has seen how much memory was free before it."""
    await daemon.die()
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == live)
    second = daemon.queue(ADAPTER, sft="wait")
    await until_trained_beside(daemon, second, [])
    assert daemon.engine.asleep == set()
    finish(daemon, second)


async def test_what_an_engine_keeps_asleep_is_no_memory_for_a_worker(daemon: Daemon, live: str) -> None:
    engines = daemon.supervisor.engines
    assert engines.held() == AWAKE
    second = daemon.queue(ADAPTER, sft="wait")
    await until_trained_beside(daemon, second, [live])
    assert engines.held() == 0
    finish(daemon, second)
    await daemon.until(lambda: daemon.supervisor.routed == live)
    assert engines.held() == AWAKE - KEPT, "as it will keep again"


async def test_nothing_sleeps_where_the_engine_cannot(daemon: Daemon, card: Card) -> None:
    daemon.engine.sleeps = False
    first = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    second = daemon.queue(sft="wait")
    await until_trained_beside(daemon, second, [])
    assert daemon.engine.slept == set()
    finish(daemon, second)
