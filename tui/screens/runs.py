"""Runs: the queue, and one run's curve, log and events as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.worker import Worker, WorkerState

from appliance import api
from appliance.api import ACTIVE
from tui.messages import RunLogged, RunSaid
from tui.screens.page import RecordPage
from tui.streams import run_events, run_log
from tui.viewmodels.box import Box
from tui.viewmodels.history import event_line
from tui.viewmodels.log_text import LogText
from tui.viewmodels.permits import why_not_resume, why_not_serve_adapter, why_not_stop
from tui.viewmodels.records import run_entry
from tui.viewmodels.trace import RunTrace
from tui.widgets.chart import Chart
from tui.widgets.lines import Lines
from tui.widgets.panes import Panes
from tui.widgets.run_summary import RunSummary


@dataclass
class Followed:
    """What is known of one run."""

    trace: RunTrace = field(default_factory=RunTrace)
    history: deque[Content] = field(default_factory=lambda: deque(maxlen=2000))


class RunsPage(RecordPage):
    NAME = "runs"
    LABEL = "Runs"
    CSS_PATH = "runs.tcss"
    EMPTY = "No runs yet.\n\nPress n to start a shipped recipe, or on a command line:\n\n  appliance train RECIPE.toml"
    ABOUT = (
        "Every run of a recipe, newest first, and the chosen one as it goes. The line is the training loss, smoothed "
        "over a tenth of the steps; the dots are single steps; each diamond is the loss on held-out rows. "
        "A stage that went back to a checkpoint draws over what it lost. Runs go on when the dashboard is closed."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "new", "New run", tooltip="Choose a shipped recipe and train it", id="run.new"),
        Binding("s", "stop", "Stop", tooltip="Write a checkpoint and stop the run", id="run.stop"),
        Binding("r", "resume", "Resume", tooltip="Go on from the last checkpoint", id="run.resume"),
        Binding(
            "a",
            "serve_adapter",
            "Adapter live",
            tooltip="Let its adapter answer while it is merged and verified",
            show=False,
            id="run.serve_adapter",
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._followed: dict[str, Followed] = {}
        self._readers: dict[str, Worker[None]] = {}
        self._log = LogText()
        self._logged = 0

    def compose_detail(self) -> ComposeResult:
        yield RunSummary(id="summary")
        yield Panes({"Loss": Chart(id="loss"), "Log": Lines(id="log"), "Events": Lines(id="events")})

    def entries(self, box: Box) -> list[tuple[str, Content]]:
        now = time.time()
        traces = {id: followed.trace for id, followed in self._followed.items()}
        return [(run.id, run_entry(run, traces.get(run.id), now)) for run in box.runs]

    def show_box(self, box: Box) -> None:
        super().show_box(box)
        self._read_on(box)

    def show_record(self, box: Box, id: str) -> None:
        followed = self._of(id)
        self.query_one(RunSummary).show(box.run(id), followed.trace)
        self.query_one(RunSummary).border_title = id
        chart = self.query_one(Chart)
        if chart.trace is not followed.trace:
            chart.show(followed.trace)
            self._start_log_and_events(followed)
            self._read_on(box)

    def _read_on(self, box: Box) -> None:
        """Have the events of what runs and of the chosen run read, and the chosen run's log."""
        for run in box.runs:
            if run.state in ("running", "stopping") or run.id == self.chosen:
                self._keep_reading(f"events {run.id}", run, partial(self._read_events, run.id))
        if chosen := box.run(self.chosen):
            self._keep_reading(f"log {chosen.id}", chosen, partial(self._read_log, chosen.id))

    def _start_log_and_events(self, followed: Followed) -> None:
        for key in [key for key in self._readers if key.startswith("log ")]:
            self._readers.pop(key).cancel()
        self._log, self._logged = LogText(), 0
        self.query_one("#log", Lines).clear()
        events = self.query_one("#events", Lines)
        events.clear()
        events.append(followed.history)

    def _keep_reading(self, key: str, run: api.Run, read: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have a worker read `key`, unless one does, or one has read all there will be."""
        reader = self._readers.get(key)
        if reader and (not reader.is_finished or (reader.state is WorkerState.SUCCESS and run.state not in ACTIVE)):
            return
        self._readers[key] = self.run_worker(read(), group=key, exit_on_error=False)

    async def _read_events(self, id: str) -> None:
        app = self.appliance
        async for events in run_events(app.client, id, self._of(id).trace.seq, app.alarm):
            self.post_message(RunSaid(id, events))

    async def _read_log(self, id: str) -> None:
        app, position = self.appliance, self._logged
        async for piece in run_log(app.client, id, position, app.alarm):
            self.post_message(RunLogged(id, position, piece))
            position += len(piece)

    @on(RunSaid)
    def _take_events(self, message: RunSaid) -> None:
        followed = self._of(message.run)
        first = not followed.trace.seq
        new = followed.trace.take(message.events)
        lines = [line for event in new if (line := event_line(event))]
        followed.history.extend(lines)
        if message.run != self.chosen:
            return
        self.query_one("#events", Lines).append(lines)
        self.query_one(RunSummary).show_changes()
        if first and self.appliance.box:
            self.query_one(Chart).refresh()
            super().show_box(self.appliance.box)

    @on(RunLogged)
    def _take_log(self, message: RunLogged) -> None:
        if message.run == self.chosen and message.position == self._logged:
            self._logged += len(message.piece)
            lines, tail = self._log.take(message.piece)
            self.query_one("#log", Lines).append(map(Content, lines), Content(tail))

    def _of(self, id: str) -> Followed:
        return self._followed.setdefault(id, Followed())

    def _chosen_run(self) -> api.Run | None:
        return self.appliance.box.run(self.chosen) if self.appliance.box else None

    async def action_new(self) -> None:
        await self.appliance.action_page("recipes")

    def action_stop(self) -> None:
        run = self._chosen_run()
        if self.appliance.refused(why_not_stop(run)) or run is None:
            return
        self.appliance.confirm(
            f"Stop {run.id}?",
            "It writes a checkpoint first; resuming goes on from there.",
            "Stop",
            lambda: self.appliance.perform(
                self.appliance.client.stop(run.id), lambda stopped: f"{stopped.id} is {stopped.state}"
            ),
        )

    def action_serve_adapter(self) -> None:
        run, box = self._chosen_run(), self.appliance.box
        if self.appliance.refused(why_not_serve_adapter(run, box.status if box else None)) or run is None:
            return
        self.appliance.confirm(
            f"Let the adapter of {run.id} answer?",
            "It is not verified yet. It answers on the live release's engine until its own release goes live.",
            "Adapter live",
            lambda: self.appliance.perform(
                self.appliance.client.promote_adapter(run.id), lambda unmerged: f"{unmerged.name} answers"
            ),
        )

    def action_resume(self) -> None:
        run = self._chosen_run()
        if not self.appliance.refused(why_not_resume(run)) and run:
            self.appliance.perform(
                self.appliance.client.resume(run.id), lambda resumed: f"{resumed.id} is {resumed.state} again"
            )
