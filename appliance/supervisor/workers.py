"""Worker processes: started, watched, asked to end, and what is said of them when they are silent or die."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from appliance import api
from appliance.errors import Conflict
from appliance.home import Home
from appliance.store.processes import Processes, ProcessRow
from appliance.store.runs import Runs
from appliance.supervisor import processes
from appliance.supervisor.snapshot import WorkerView
from appliance.supervisor.watch import LEAST_SILENCE_SECONDS, explain_death, last_lines, longest_silence
from appliance.train.events import EventLog
from appliance.train.interruption import ENDING
from appliance.train.recipe import AFTER_TRAINING

STOP_SECONDS = 300.0
"""How long a worker may take to obey: a forward and backward pass, and a checkpoint."""


class Workers:
    """Effects on workers and their runs' events. What it remembers only saves asking twice."""

    def __init__(self, home: Home, runs: Runs, processes_kept: Processes, command: tuple[str, ...]) -> None:
        self._home = home
        self._runs = runs
        self._processes = processes_kept
        self._command = command
        self._told_to_stop: dict[str, float] = {}
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
                silent=self._silent(row.owner),
            )
            for row in self._processes.all()
            if row.kind == "worker"
        )

    def tell_to_stop(self, run: str) -> None:
        """Ask it to write a checkpoint and end."""
        self._told_to_stop[run] = time.monotonic()
        processes.terminate(self._row(run))

    def kill(self, run: str) -> None:
        """End it at once."""
        processes.kill(self._row(run))

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
        row = processes.spawn("worker", run.id, run.stage, argv, environment, directory / "log.txt", self._home.root)
        self._processes.add(row)

    def forget(self, run: str, lost: bool) -> None:
        """Take a dead worker off the record; of a lost one, say how it died."""
        row = self._row(run)
        self._processes.remove(row)
        self._told_to_stop.pop(run, None)
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
        """Take away all that a run's stages have made. Safe to repeat after a kill: the mark goes last."""
        directory = self._home.runs / run
        found = self._runs.get(run)
        for stage in found.stages:
            shutil.rmtree(directory / stage, ignore_errors=True)
        self._runs.advance(run, found.stages[0])
        self._events(run).append("warning", found.stage, code="discarded", message="stopped, and its work discarded")
        self._mark(run).unlink(missing_ok=True)

    def mark_to_end(self, run: api.Run) -> None:
        """Let the training stage end at its next step and the run go on with what it has learnt. Raises Conflict."""
        if run.state != "running" or run.stage in AFTER_TRAINING:
            raise Conflict(
                "not_training", f"run {run.id} does not train now", f"see `appliance runs {run.id}`; resume it first"
            )
        mark = self._home.runs / run.id / run.stage / ENDING
        mark.parent.mkdir(exist_ok=True)  # in its first second a stage has not made it yet
        mark.touch()

    def mark_to_discard(self, run: str) -> None:
        """Let the run's work be taken away as soon as it has stopped, also by a later daemon."""
        self._mark(run).touch()

    def is_to_discard(self, run: str) -> bool:
        return self._mark(run).exists()

    def _silent(self, run: str) -> bool:
        """Whether its last event is longer ago than is usual for it. What is usual is worked out once an event."""
        try:
            said = self._events(run).path.stat().st_mtime
        except FileNotFoundError:
            return False
        if time.time() - said < LEAST_SILENCE_SECONDS:
            return False
        if self._silences.get(run, (0.0, 0.0))[0] != said:
            self._silences[run] = (said, longest_silence(self._events(run).read())[0])
        return time.time() - said > self._silences[run][1]

    def _mark(self, run: str) -> Path:
        return self._home.runs / run / "discard"

    def _events(self, run: str) -> EventLog:
        return EventLog(self._home.runs / run / "events.jsonl")

    def _row(self, run: str) -> ProcessRow:
        return next(row for row in self._processes.all() if (row.kind, row.owner) == ("worker", run))
