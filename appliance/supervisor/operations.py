"""What an operator may ask of the box. It is put on record here; the loop does it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

from appliance import api
from appliance.api import ACTIVE
from appliance.canary import Limits
from appliance.errors import Conflict
from appliance.home import Home
from appliance.store.canaries import Canaries
from appliance.store.processes import Processes
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.store.unmerged import UnmergedAdapters
from appliance.supervisor.checks import Checks
from appliance.supervisor.engine_processes import EngineProcesses, Frontage
from appliance.supervisor.engines import EngineKind, advice_on_two
from appliance.supervisor.probing import Probes
from appliance.supervisor.run_steps import RunSteps
from appliance.supervisor.trial import Ratings, Trial
from appliance.supervisor.unmerged import Unmerged
from appliance.supervisor.workers import Workers
from appliance.train.recipe import AFTER_TRAINING

ADAPTER_SECONDS = 60.0
"""How long a promotion of an adapter waits to see it answer; it goes on where an engine takes longer."""


class Operations:
    """The parts that the box is made of, and the wishes of operators. `poke` lets the loop look at once."""

    def __init__(
        self,
        home: Home,
        db: sqlite3.Connection,
        engine: EngineKind,
        frontage: Frontage,
        exclusive: bool,
        canary_requests: int,
        drain_seconds: float,
        ratings: Ratings,
        worker_command: tuple[str, ...],
    ) -> None:
        self.home = home
        self.exclusive = exclusive
        self.runs = Runs(db)
        self.releases = Releases(db)
        self.processes = Processes(db)
        self.workers = Workers(home, self.runs, self.processes, worker_command)
        self.checks = Checks(home, self.releases, self.poke)
        self.steps = RunSteps(home, self.runs, self.releases, self.checks)
        self.engines = EngineProcesses(home, engine, self.releases, self.processes, frontage, drain_seconds, self.poke)
        self.probes = Probes(engine, self.poke)
        self.trial = Trial(Canaries(db), self.releases, ratings, frontage, Limits(canary_requests))
        self.unmerged = Unmerged(home, UnmergedAdapters(db), self.releases)
        self.routed: str | None = None
        self.routed_adapter: str | None = None
        self._poke = asyncio.Event()
        self._writing_adapter = asyncio.Lock()

    def poke(self) -> None:
        """Look again now: something has changed."""
        self._poke.set()

    def stop(self, run_id: str, how: api.StopWish) -> api.Run:
        """Let a run stop and keep its checkpoints (`pause`), or lose its work (`discard`), or let its training end with
        what it has learnt and the run go on (`keep`).

        Raises NotFound, and Conflict where there is nothing to keep or to discard.
        """
        run = self.runs.get(run_id)
        if how == "keep":
            if run.state != "running" or run.stage in AFTER_TRAINING:
                next = f"see `appliance runs {run_id}`; resume it first"
                raise Conflict("not_training", f"run {run_id} does not train now", next)
            self.runs.wish_to_keep(run_id)
        elif how == "discard" and run.state == "finished":
            raise Conflict("run_finished", f"run {run_id} has finished", "leave what it made as it is")
        elif how == "discard" or run.state in ACTIVE:
            self.runs.mark_stopping(run_id, how)
        self.poke()
        return self.runs.get(run_id)

    def resume(self, run_id: str) -> api.Run:
        """Queue a run again that has stopped or failed. Raises NotFound, and Conflict for one that has finished."""
        run = self.runs.get(run_id)
        if run.state in ACTIVE:
            return run
        if run.state == "finished":
            raise Conflict("run_finished", f"run {run_id} has finished", "start a new one: `appliance train RECIPE`")
        (self.steps.directory(run_id) / run.stage / "failure.json").unlink(missing_ok=True)
        self.engines.forgive(run_id)
        self.runs.queue_again(run_id)
        self.poke()
        return self.runs.get(run_id)

    def promote(self, release: str) -> api.Release:
        """Make a verified release live, if its files are whole. Raises NotFound, or Conflict for an unfit one."""
        promoted = self.releases.promote(release)
        self.engines.forgive(promoted.id)
        self.poke()
        return promoted

    def rollback(self) -> api.Release:
        """End the canary or the unmerged adapter, or else make the release live that was before.

        Raises Conflict where there is none of them.
        """
        if unmerged := self.adapter_status():
            self.runs.set_promotes(unmerged.run, False)
            self.unmerged.end("by hand")
            self.poke()
            return self.releases.get(unmerged.live)
        if canary := self.trial.status():
            self.trial.end("rolled back", "by hand")
            self.poke()
            return self.releases.get(canary.live)
        release = self.releases.rollback()
        self.engines.forgive(release.id)
        self.poke()
        return release

    async def promote_adapter(self, run_id: str) -> api.Unmerged:
        """Let the adapter of a run answer now, and its release as soon as it is verified.

        Raises NotFound; Conflict and InvalidInput where that cannot be, or the engine does not take the adapter.
        """
        run = self.runs.get(run_id)
        if not self.engines.kind.adapter_rank:
            raise Conflict(
                "no_adapters",
                f"the engine {self.engines.kind.name} serves merged weights only",
                "start with vLLM and APPLIANCE_ADAPTER_RANK=32 (or the adapter's own rank), or wait for the release",
            )
        live = self.unmerged.require_possible(run)
        if self.exclusive:
            raise Conflict(
                "no_room",
                "the lease is exclusive: no engine runs while an adapter is merged and verified",
                f"{self._advice_on_two(live)}; or wait for the release",
            )
        if canary := self.trial.view():
            raise Conflict("canary_under_way", f"{canary.release} is the canary", "wait until it has ended, or end it")
        rank = self.engines.kind.adapter_rank
        async with self._writing_adapter:
            # Asked again, an engine may be loading the files that are there.
            if not self.unmerged.under_way(run_id, live):
                await asyncio.to_thread(self.unmerged.write, run_id, live, self.steps.recipe(run_id), rank)
            self.unmerged.start(run_id, live)
        started = self.unmerged.status(answers=False)
        self.runs.set_promotes(run_id, True)
        self.poke()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADAPTER_SECONDS):
                while self.routed_adapter != run_id and not self.unmerged.ended_because(run_id):
                    await asyncio.sleep(0.02)
        now = self.adapter_status() or (started if self.releases.live() == run_id else None)
        if now is None:
            raise Conflict("not_loaded", self.unmerged.ended_because(run_id), f"see `appliance logs {live} --engine`")
        return now

    def adapter_status(self) -> api.Unmerged | None:
        """The adapter that answers, or is about to, before its release can."""
        return self.unmerged.status(answers=self.routed_adapter is not None)

    def start_canary(self, release: str, share: float) -> api.Canary:
        """Let a release answer a share of the conversations. Raises NotFound, and Conflict where it cannot."""
        if unmerged := self.adapter_status():
            raise Conflict(
                "adapter_under_way",
                f"the adapter of {unmerged.run} answers, unmerged",
                "wait until its release is live, or end it: `appliance rollback`",
            )
        present = any(row.owner == release for row in self.engines.rows())
        self.releases.require_fit(release)
        has_room = not self.exclusive and (present or self.engines.room([release]))
        canary = self.trial.start(release, share, lacking="" if has_room else self._advice_on_two(release))
        self.engines.forgive(release)
        self.poke()
        return canary

    def _advice_on_two(self, release: str) -> str:
        """How an engine of `release` and another like it have room at once, or that they have none."""
        return advice_on_two(self.engines.kind.room(self.engines.models.directory(release), beside=True))
