"""Worker processes: started, watched, asked to end, and what is said of them when they are silent or die."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time

from appliance import api
from appliance.home import Home
from appliance.store.processes import Processes, ProcessRow
from appliance.store.runs import Runs
from appliance.supervisor import processes
from appliance.supervisor.snapshot import WorkerView
from appliance.supervisor.watch import LEAST_SILENCE_SECONDS, explain_death, last_lines, longest_silence
from appliance.train.events import EventLog
from appliance.train.interruption import ENDING

log = logging.getLogger(__name__)

STOP_SECONDS = 300.0
"""How long a worker may take to obey: a forward and backward pass, and a checkpoint."""
KILL_AGAIN_SECONDS = 60.0
"""A killed worker that is not gone after so long is killed once more, and told of."""


class Workers:
    """Effects on workers and their runs' events. What it remembers only saves asking twice."""

    def __init__(self, home: Home, runs: Runs, processes_kept: Processes, command: tuple[str, ...]) -> None:
        self._home = home
        self._runs = runs
        self._processes = processes_kept
        self._command = command
        self._told_to_stop: dict[str, float] = {}
        self._killed: dict[str, float] = {}
        self._silences: dict[str, tuple[float, float]] = {}
        self._kernel_kills = processes.kernel_kills()

    def views(self) -> tuple[WorkerView, ...]:
        """The workers on record as decisions see them."""
        now = time.monotonic()
        return tuple(
            WorkerView(
                row.owner,
                processes.alive(row),
                told_to_stop=row.owner in self._told_to_stop,
                overdue=now - self._told_to_stop.get(row.owner, now) > STOP_SECONDS,
                killed=now - self._killed.get(row.owner, -math.inf) < KILL_AGAIN_SECONDS,
                silent=self._silent(row.owner),
                begun=row.pid > 0,
            )
            for row in self._processes.all()
            if row.kind == "worker"
        )

    def tell_to_stop(self, run: str) -> None:
        """Ask it to write a checkpoint and end."""
        self._told_to_stop[run] = time.monotonic()
        processes.terminate(self._row(run))

    def kill(self, run: str) -> None:
        """End it at once. Where it does not go, which a driver may be the cause of, that is told."""
        row = self._row(run)
        if run in self._killed:
            log.error("the %s process of %s (pid %d) does not end, though it was killed", row.stage, run, row.pid)
            self._events(run).append(
                "warning",
                row.stage,
                code="unkillable",
                message=f"the {row.stage} process (pid {row.pid}) does not end, though it was killed",
                next="a driver holds it: see the kernel's log (`dmesg`); where it stays so, restart the machine",
            )
        self._killed[run] = time.monotonic()
        processes.kill(row)

    def start(self, run: api.Run, live: str | None) -> None:
        """Start the process of the run's present stage; `live` is the release that quality is compared with, if any."""
        directory = self._home.runs / run.id
        environment = {
            # Rows of many lengths leave pieces of memory that fit no other.
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            **os.environ,
            "APPLIANCE_LIVE_RELEASE": live or "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        argv = [*self._command, str(directory), run.stage]
        self._runs.mark_running(run.id)
        self._told_to_stop.pop(run.id, None)
        row = processes.new_row("worker", run.id, run.stage)
        processes.start(self._processes, row, argv, environment, directory / "log.txt", self._home.root)

    def forget(self, run: str, lost: bool) -> None:
        """Take a dead worker off the record; of a lost one, say how it died."""
        row = self._row(run)
        self._processes.remove(row)
        self._told_to_stop.pop(run, None)
        self._killed.pop(run, None)
        kills, before = processes.kernel_kills(), self._kernel_kills
        self._kernel_kills = kills
        death = explain_death(processes.exit_status(row), kills > before)
        if not lost:
            return
        self._runs.lose(run)
        self._events(run).append(
            "warning",
            row.stage,
            code="out_of_memory" if death.out_of_memory else "worker_died",
            message=f"the {row.stage} process {death.cause}; going on from its last checkpoint",
            cause=death.cause,
            next=death.next,
            log=last_lines(self._home.runs / run / "log.txt"),
        )

    def retry(self, run: api.Run) -> None:
        """Let a stage that ran out of memory start once more, which counts as a loss."""
        (self._home.runs / run.id / run.stage / "failure.json").unlink(missing_ok=True)
        self._runs.lose(run.id)
        self._events(run.id).append(
            "warning",
            run.stage,
            code="crowded",
            message=f"{run.stage} ran out of memory beside the engine that slept; that is stopped, and it starts again",
        )

    def warn_of_silence(self, run: api.Run) -> None:
        """Say that the worker may hang. That is an event too: the next warning comes after as long a silence again."""
        events = self._events(run.id).read()
        silence, usual = time.time() - events[-1]["time"], longest_silence(events)[1]
        self._events(run.id).append(
            "warning",
            run.stage,
            code="silent",
            message=f"the {run.stage} process has said nothing for {silence / 60:.0f} min, and {usual}: it may hang",
            next=f"see `appliance logs {run.id}`; `appliance stop {run.id}`, then `appliance resume {run.id}`",
        )

    def discard(self, run: str) -> None:
        """Take away all that a run's stages have made. Safe to repeat after a kill."""
        directory = self._home.runs / run
        found = self._runs.get(run)
        for stage in found.stages:
            shutil.rmtree(directory / stage, ignore_errors=True)
        self._runs.advance(run, found.stages[0])
        self._events(run).append("warning", found.stage, code="discarded", message="stopped, and its work discarded")

    def end_stage(self, run: api.Run) -> None:
        """Let the training stage end at its next step, as soon as it has a directory to be told so in."""
        directory = self._home.runs / run.id / run.stage
        if directory.exists():
            (directory / ENDING).touch()

    def is_ending(self, run: api.Run) -> bool:
        """Whether its present stage was told to end."""
        return (self._home.runs / run.id / run.stage / ENDING).exists()

    def _silent(self, run: str) -> bool:
        """Whether its last event is longer ago than is usual for it. What is usual is worked out once an event.

        Where its events cannot be read, nobody knows.
        """
        try:
            said = self._events(run).path.stat().st_mtime
            if time.time() - said < LEAST_SILENCE_SECONDS:
                return False
            if self._silences.get(run, (0.0, 0.0))[0] != said:
                self._silences[run] = (said, longest_silence(self._events(run).read())[0])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return time.time() - said > self._silences[run][1]

    def _events(self, run: str) -> EventLog:
        return EventLog(self._home.runs / run / "events.jsonl")

    def _row(self, run: str) -> ProcessRow:
        return next(row for row in self._processes.all() if (row.kind, row.owner) == ("worker", run))
