"""The loop with real processes that do nothing: stages, kills, engines, restarts of the daemon."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mortal_daemon import RECIPE, Daemon

from appliance.api import Precision
from appliance.errors import Conflict, NotFound
from appliance.supervisor import decide
from appliance.supervisor.engines import Room
from appliance.supervisor.snapshot import Failure
from appliance.train.events import EventLog


async def test_a_run_goes_all_the_way_to_live(daemon: Daemon) -> None:
    run = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    assert daemon.starts(run) == ["sft", "merge", "verify"]
    assert daemon.supervisor.runs.get(run).state == "finished"
    release = daemon.supervisor.releases.get(run)
    assert (release.state, release.live) == ("verified", True)
    assert release.gates == dict.fromkeys(("structure", "fidelity", "quality", "parity", "stopping"), True)
    manifest = json.loads((daemon.home.releases / run / "manifest.json").read_bytes())
    assert manifest["state"] == "verified"
    assert daemon.frontage.routes == [run]


async def test_a_run_that_ends_in_its_adapter_makes_no_release(daemon: Daemon) -> None:
    run = daemon.queue(RECIPE.model_copy(update={"end": "adapter"}))
    await daemon.until(lambda: daemon.supervisor.runs.get(run).state == "finished")
    assert daemon.starts(run) == ["sft"]
    assert daemon.supervisor.releases.all() == []
    assert (daemon.home.runs / run / "sft" / "result.json").exists()


async def test_the_next_release_takes_over_and_the_old_engine_stops(daemon: Daemon) -> None:
    first = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    second = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == second)
    await daemon.until(lambda: daemon.running("engine") == [second])
    assert daemon.frontage.routes == [first, second], "nobody was without an answer"
    daemon.supervisor.releases.rollback()
    daemon.supervisor.poke()
    await daemon.until(lambda: daemon.supervisor.routed == first)


@pytest.mark.parametrize(("said", "state"), [(-1.05, "verified"), (-1.5, "refused")])
async def test_an_engine_that_can_say_how_likely_text_is_has_to_agree(daemon: Daemon, said: float, state: str) -> None:
    daemon.engine.logps = [0.0, said]
    run = daemon.queue()
    await daemon.until_state(run, "finished")
    assert daemon.supervisor.releases.get(run).state == state
    manifest = json.loads((daemon.home.releases / run / "manifest.json").read_bytes())
    fidelity = manifest["gates"]["fidelity"]
    assert fidelity["passed"] == (state == "verified")
    assert fidelity["figures"]["served"]["mean_difference"] == pytest.approx(abs(said + 1))


async def test_what_is_served_in_fp8_has_the_limit_of_fp8_and_its_manifest_says_so(daemon: Daemon) -> None:
    daemon.engine.logps, daemon.engine.precision = [0.0, -1.5], "FP8"
    run = daemon.queue()
    await daemon.until_state(run, "finished")
    assert daemon.supervisor.releases.get(run).state == "verified"
    manifest = json.loads((daemon.home.releases / run / "manifest.json").read_bytes())
    assert manifest["gates"]["fidelity"]["figures"]["served"]["precision"] == "FP8"
    assert (manifest["reference"]["engine"], manifest["reference"]["precision"]) == ("fake", "FP8")
    card = (daemon.home.releases / run / "README.md").read_text()
    assert "\nProbed and served by fake in FP8 (weights of linear layers in 8 bits, the others in 16).\n" in card


@pytest.mark.parametrize(("proven", "now"), [("16-bit", "FP8"), ("FP8", "16-bit")])
async def test_a_release_is_served_as_it_was_proven_whatever_the_settings_say_since(
    daemon: Daemon, proven: Precision, now: Precision
) -> None:
    daemon.engine.precision = proven
    run = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    daemon.engine.precision = now
    os.kill(daemon.pid("engine", run), signal.SIGKILL)
    await daemon.until(lambda: len(daemon.engine.started) == 2)
    assert daemon.engine.started == [(run, proven), (run, proven)]


async def test_a_run_whose_fp8_nobody_has_measured_cannot_go_on(daemon: Daemon) -> None:
    """The card that verified it could not serve so, or its settings have changed since."""
    daemon.engine.logps, daemon.engine.precision = [0.0, -1.0], "FP8"
    run = daemon.queue(verify="no fp8")
    await daemon.until_state(run, "failed")
    assert "what that makes of it was not measured" in daemon.supervisor.runs.get(run).reason
    assert daemon.supervisor.runs.get(run).next == "queue its recipe again"


async def test_a_gate_that_fails_refuses_the_release(daemon: Daemon) -> None:
    daemon.engine.token_ids = [1, 3]
    run = daemon.queue()
    await daemon.until_state(run, "finished")
    release = daemon.supervisor.releases.get(run)
    assert (release.state, release.live, release.gates["parity"]) == ("refused", False, False)
    assert "refused" in daemon.supervisor.runs.get(run).reason
    assert daemon.supervisor.routed is None


async def test_a_release_that_verify_refused_needs_no_engine(daemon: Daemon) -> None:
    run = daemon.queue(verify="refuse")
    await daemon.until_state(run, "finished")
    assert daemon.supervisor.releases.get(run).state == "refused"
    assert not (daemon.home.engines / f"{run}.log").exists()


async def test_a_worker_that_dies_is_started_again(daemon: Daemon) -> None:
    run = daemon.queue(sft="die once")
    await daemon.until_state(run, "finished")
    assert daemon.starts(run)[:2] == ["sft", "sft"]


async def test_a_worker_that_dies_every_time_is_given_up(daemon: Daemon) -> None:
    run = daemon.queue(sft="die")
    await daemon.until_state(run, "failed")
    assert daemon.starts(run) == ["sft"] * 5
    failed = daemon.supervisor.runs.get(run)
    assert failed.reason == "the sft process died 5 times; the last time it was killed (SIGKILL)"
    assert failed.next == f"find out who ends processes on this box; see `appliance logs {run}`"
    *warnings, last = daemon.events(run)
    assert len(warnings) == 5
    assert warnings[0]["message"] == "the sft process was killed (SIGKILL); going on from its last checkpoint"
    assert warnings[0]["log"] == ["about to die"]
    assert (last["event"], last["reason"], last["log"]) == ("failed", failed.reason, ["about to die"] * 5)


async def test_a_worker_that_the_kernel_killed_is_out_of_memory(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.supervisor.processes.kernel_kills", itertools.count(1000).__next__)
    run = daemon.queue(sft="die once")
    await daemon.until_state(run, "finished")
    warning = daemon.events(run)[0]
    assert warning["code"] == "out_of_memory"
    assert "killed by the kernel because the memory ran out" in warning["message"]


async def test_a_silent_worker_is_warned_of_and_not_at_once_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.supervisor.workers.LEAST_SILENCE_SECONDS", 0.0)
    monkeypatch.setattr("appliance.supervisor.watch.LEAST_SILENCE_SECONDS", 0.0)
    run = daemon.queue(sft="hang")
    log = EventLog(daemon.home.runs / run / "events.jsonl")
    for step in range(3):
        log.append("step", "sft", step=step)
        await asyncio.sleep(0.02)
    await daemon.until(lambda: len(daemon.events(run)) == 5)
    first, second = daemon.events(run)[3:]
    assert first["code"] == "silent"
    assert "a step takes 0.0 s as a rule: it may hang" in first["message"]
    assert second["time"] - first["time"] > 0.3, "twenty steps later"


async def test_a_worker_that_does_not_obey_is_killed(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.supervisor.workers.STOP_SECONDS", 0.3)
    run = daemon.queue(sft="defy")
    await daemon.until(lambda: daemon.starts(run))
    await asyncio.sleep(0.3)
    daemon.supervisor.runs.mark_stopping(run)
    await daemon.until_state(run, "stopped")
    assert daemon.supervisor.runs.losses(run) == 0


async def test_stopped_to_be_discarded_a_run_has_made_nothing(daemon: Daemon) -> None:
    run = daemon.queue(merge="hang")
    await daemon.until(lambda: "merge" in daemon.starts(run))
    daemon.supervisor.stop(run, "discard")
    await daemon.until_state(run, "stopped")
    assert not (daemon.home.runs / run / "sft").exists()
    assert not (daemon.home.runs / run / "merge").exists()
    assert daemon.supervisor.runs.get(run).stage == "sft"
    (daemon.home.runs / run / "behaviour.json").write_text("{}")
    daemon.supervisor.runs.queue_again(run)
    await daemon.until_state(run, "finished")
    assert daemon.starts(run) == ["sft", "merge", "sft", "merge", "verify"]


async def test_a_failure_is_reported_in_its_own_words_and_can_be_resumed(daemon: Daemon) -> None:
    run = daemon.queue(merge="fail")
    await daemon.until_state(run, "failed")
    failed = daemon.supervisor.runs.get(run)
    assert (failed.reason, failed.next) == ("the rows are too long", "set max_length")
    (daemon.home.runs / run / "merge" / "failure.json").unlink()
    (daemon.home.runs / run / "behaviour.json").write_text("{}")
    daemon.supervisor.runs.queue_again(run)
    await daemon.until_state(run, "finished")
    assert daemon.starts(run) == ["sft", "merge", "merge", "verify"], "what was done is not done again"


async def test_runs_go_one_after_the_other(daemon: Daemon) -> None:
    first = daemon.queue(sft="hang")
    second = daemon.queue()
    await daemon.until(lambda: daemon.starts(first))
    assert daemon.supervisor.runs.get(second).state == "queued"
    daemon.supervisor.runs.mark_stopping(first)
    await daemon.until_state(first, "stopped")
    await daemon.until_state(second, "finished")


async def test_a_new_daemon_goes_on_with_the_worker_of_the_old(daemon: Daemon) -> None:
    run = daemon.queue(sft="hang")
    await daemon.until(lambda: daemon.starts(run))
    worker = daemon.pid("worker", run)
    await daemon.die()
    daemon.start()
    await asyncio.sleep(0.2)
    assert daemon.pid("worker", run) == worker
    assert daemon.starts(run) == ["sft"]


async def test_a_worker_that_died_with_its_daemon_is_started_again(daemon: Daemon) -> None:
    run = daemon.queue(sft="hang")
    await daemon.until(lambda: daemon.starts(run))
    await daemon.die()
    os.kill(daemon.pid("worker", run), signal.SIGKILL)
    (daemon.home.runs / run / "behaviour.json").write_text("{}")
    daemon.start()
    await daemon.until_state(run, "finished")


async def test_a_worker_that_no_record_names_is_killed_first(daemon: Daemon) -> None:
    run = daemon.queue(sft="hang")
    await daemon.until(lambda: daemon.starts(run))
    worker = daemon.pid("worker", run)
    await daemon.die()
    daemon.db.execute("DELETE FROM processes")
    daemon.start()
    await daemon.until(lambda: len(daemon.starts(run)) == 2)
    assert daemon.pid("worker", run) != worker
    state = Path(f"/proc/{worker}/stat")
    assert not state.exists() or " Z " in state.read_text()


@pytest.mark.parametrize("moment", ["sft", "merge", "verify", "engine", "live"])
async def test_a_daemon_killed_at_any_moment_still_ends_live(daemon: Daemon, moment: str) -> None:
    run = daemon.queue()
    reached: dict[str, Callable[[], Any]] = {
        "sft": lambda: "sft" in daemon.starts(run),
        "merge": lambda: "merge" in daemon.starts(run),
        "verify": lambda: "verify" in daemon.starts(run),
        "engine": lambda: daemon.running("engine"),
        "live": lambda: (daemon.home.releases / run / "manifest.json").exists(),
    }
    await daemon.until(reached[moment])
    await daemon.die()
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    assert daemon.supervisor.runs.get(run).state == "finished"
    assert len(daemon.supervisor.releases.all()) == 1


async def test_killed_between_the_manifest_and_the_record(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*arguments: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(daemon.supervisor.releases, "add", torn)
    run = daemon.queue()
    await daemon.until(lambda: (daemon.home.releases / run / "manifest.json").exists())
    await daemon.die()
    assert daemon.supervisor.releases.all() == []
    monkeypatch.undo()
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == run)


async def test_a_dead_engine_is_started_again_and_nobody_is_routed_to_it_meanwhile(daemon: Daemon) -> None:
    run = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == run)
    killed = daemon.pid("engine", run)
    os.kill(killed, signal.SIGKILL)
    await daemon.until(lambda: daemon.supervisor.routed is None)
    await daemon.until(lambda: daemon.supervisor.routed == run)
    assert daemon.pid("engine", run) != killed
    assert daemon.frontage.routes == [run, None, run]


def test_an_engine_that_keeps_dying_rests_ever_longer() -> None:
    def rest(count: int) -> int:
        """Seconds that it is not started again after it has died so often."""
        return next(second for second in range(100) if not decide.rests(Failure(count, 0.0), second))

    assert [rest(count) for count in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


async def test_a_release_on_which_no_engine_starts_is_given_up(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "LONGEST_REST_SECONDS", 0.05)
    daemon.engine.broken = {"facts-1"}
    run = daemon.queue()
    await daemon.until_state(run, "failed")
    failed = daemon.supervisor.runs.get(run)
    assert failed.reason == "its engine failed 3 times; the last time it ended with exit status 1"
    assert failed.next == f"see `appliance logs {run} --events`, then `appliance resume {run}`"
    warned = [event["message"] for event in daemon.events(run) if event.get("code") == "engine_failed"]
    assert warned == [f"the engine of {run} ended with exit status 1"] * 3


async def test_a_release_whose_engine_never_answers_its_probes_is_given_up(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "LONGEST_REST_SECONDS", 0.05)
    daemon.engine.unreachable = 1000
    run = daemon.queue()
    await daemon.until_state(run, "failed")
    assert daemon.engine.probed == [run] * 3
    assert "the last time it did not answer its probes: it is gone" in daemon.supervisor.runs.get(run).reason
    await daemon.until(lambda: daemon.running("engine") == [])


async def test_an_exclusive_lease_stops_the_engine_while_a_worker_runs(daemon: Daemon) -> None:
    first = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == first)
    daemon.supervisor.exclusive = True
    second = daemon.queue(sft="hang")
    await daemon.until(lambda: daemon.starts(second))
    assert daemon.running("engine") == []
    assert daemon.supervisor.routed is None
    daemon.supervisor.runs.mark_stopping(second)
    await daemon.until(lambda: daemon.supervisor.routed == first)
    assert daemon.running("worker") == []


async def test_a_release_that_only_quality_refused_is_probed_so_that_it_can_be_accepted(daemon: Daemon) -> None:
    run = daemon.queue(verify="worse")
    await daemon.until_state(run, "finished")
    release = daemon.supervisor.releases.get(run)
    assert (release.state, release.live) == ("refused", False)
    passed = {name for name, passed in release.gates.items() if passed}
    assert passed == {"structure", "fidelity", "parity", "stopping"}


async def two_releases(daemon: Daemon) -> tuple[str, str]:
    """A live release, and another that could be."""
    live = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == live)
    other = daemon.queue(RECIPE.model_copy(update={"promote": False}))
    await daemon.until_state(other, "finished")
    await daemon.until(lambda: daemon.running("engine") == [live])
    return live, other


def answers(daemon: Daemon, live: int = 0, canary: int = 0, errors: int = 0) -> None:
    """What the gateway would have counted."""
    comparison = daemon.frontage.comparison
    for _ in range(live):
        comparison.live_tally.add_answer(["stop"], {})
    for _ in range(canary):
        comparison.candidate_tally.add_answer(["stop"], {})
    for _ in range(errors):
        comparison.candidate_tally.add_error()


async def test_a_canary_that_does_well_goes_live_by_itself(daemon: Daemon) -> None:
    live, other = await two_releases(daemon)
    daemon.supervisor.start_canary(other, 0.1)
    await daemon.until(lambda: daemon.frontage.canaries == [(other, 0.1)])
    answers(daemon, live=20, canary=99)
    await asyncio.sleep(0.1)
    assert daemon.supervisor.releases.live() == live
    engine = daemon.pid("engine", other)
    answers(daemon, canary=1)
    await daemon.until(lambda: daemon.running("engine") == [other])
    assert daemon.frontage.routes == [live, other]
    assert daemon.frontage.canaries == [(other, 0.1), None]
    assert daemon.pid("engine", other) == engine, "no engine is started again for it"
    ended = daemon.supervisor.trial.newest()[other]
    assert (ended.outcome, [side.requests for side in ended.figures]) == ("promoted", [20, 100])
    assert daemon.supervisor.releases.rollback().id == live


async def test_a_canary_that_fails_goes_back_by_itself(daemon: Daemon) -> None:
    live, other = await two_releases(daemon)
    daemon.supervisor.start_canary(other, 0.1)
    await daemon.until(lambda: daemon.frontage.canaries)
    answers(daemon, live=40, errors=3)
    await daemon.until(lambda: daemon.running("engine") == [live])
    ended = daemon.supervisor.trial.newest()[other]
    assert (ended.outcome, ended.reason) == (
        "rolled back",
        "3 of 3 requests to it failed, and 0 of 40 to the live release",
    )
    assert daemon.frontage.routes == [live]
    assert daemon.frontage.canaries[-1] is None
    daemon.supervisor.start_canary(other, 0.2)
    await daemon.until(lambda: daemon.frontage.canaries[-1] == (other, 0.2))
    assert daemon.frontage.comparison.candidate_tally.requests == 0, "a new canary begins with new figures"


async def test_a_canary_on_which_no_engine_starts_goes_back(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "LONGEST_REST_SECONDS", 0.05)
    live, other = await two_releases(daemon)
    daemon.engine.broken = {other}
    daemon.supervisor.start_canary(other, 0.1)
    await daemon.until(lambda: daemon.supervisor.trial.status() is None)
    assert daemon.supervisor.trial.newest()[other].reason.startswith("its engine failed 3 times")
    assert daemon.frontage.canaries == []
    assert daemon.supervisor.routed == live


async def test_earlier_failures_of_its_engine_are_not_held_against_a_canary(daemon: Daemon) -> None:
    _, other = await two_releases(daemon)
    daemon.supervisor.engines.failures[other] = Failure(3)
    daemon.supervisor.start_canary(other, 0.1)
    await daemon.until(lambda: daemon.frontage.canaries == [(other, 0.1)])


async def test_a_canary_outlasts_its_daemon(daemon: Daemon) -> None:
    _, other = await two_releases(daemon)
    daemon.supervisor.start_canary(other, 0.1)
    await daemon.until(lambda: daemon.frontage.canaries)
    answers(daemon, live=20, canary=50)
    engine = daemon.pid("engine", other)
    await daemon.die()
    daemon.frontage.canaries.clear()
    daemon.start()
    await daemon.until(lambda: daemon.frontage.canaries == [(other, 0.1)])
    assert daemon.pid("engine", other) == engine
    answers(daemon, live=20, canary=100)
    await daemon.until(lambda: daemon.supervisor.routed == other)


async def test_killed_between_going_live_and_the_record(daemon: Daemon) -> None:
    live, other = await two_releases(daemon)
    daemon.supervisor.start_canary(other, 0.1)
    await daemon.until(lambda: daemon.frontage.canaries)
    await daemon.die()
    daemon.supervisor.releases.promote(other)
    daemon.start()
    await daemon.until(lambda: daemon.supervisor.routed == other)
    assert daemon.supervisor.trial.status() is None
    assert daemon.supervisor.trial.newest()[other].outcome == "promoted"
    assert daemon.supervisor.releases.rollback().id == live


async def test_a_canary_says_what_it_waits_for(daemon: Daemon) -> None:
    _, other = await two_releases(daemon)
    assert daemon.supervisor.trial.status() is None
    daemon.supervisor.start_canary(other, 0.1)
    started = daemon.supervisor.trial.status()
    assert started is not None
    assert "its engine is starting" in started.reason
    await daemon.until(lambda: daemon.frontage.canaries)
    answers(daemon, live=15, canary=40)
    present = daemon.supervisor.trial.status()
    assert present is not None
    assert present.reason == "waits for more requests: 60 to it, 5 to the live release"
    assert [side.requests for side in present.figures] == [15, 40]
    assert any("100 requests" in sentence for sentence in present.limits)


async def test_where_no_canary_can_be(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    live, other = await two_releases(daemon)

    def refused(release: str) -> str:
        with pytest.raises(Conflict) as refusal:
            daemon.supervisor.start_canary(release, 0.1)
        assert daemon.supervisor.trial.status() is None
        return f"{refusal.value.code}: {refusal.value.next}"

    with pytest.raises(NotFound):
        daemon.supervisor.start_canary("nope", 0.1)
    assert refused(live).startswith("already_live")
    daemon.supervisor.exclusive = True
    for_both = "APPLIANCE_LEASE=share and APPLIANCE_GPU_MEMORY_SHARE=0.45 make room for two engines"
    assert refused(other) == f"no_room: {for_both}; or promote it for everybody: `appliance promote {other}`"
    daemon.supervisor.exclusive = False
    monkeypatch.setattr("appliance.hardware.free_memory", lambda: -1)
    monkeypatch.setattr(daemon.engine, "room", lambda model, beside: Room(3 << 30, 2 << 30))
    assert refused(other).startswith("no_room: this box cannot hold two engines for it: each takes 3.0 GiB; or promote")
