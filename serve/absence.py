"""Why nobody answers at the endpoint, in words, and when somebody will again."""

from __future__ import annotations

import asyncio
import time

from appliance.home import Home
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.train.events import EventLog
from serve.gateway.admission import NOTHING_LIVE, Absence


class Absences:
    """Knows the state. Under an `exclusive` lease no engine runs beside a worker."""

    def __init__(self, home: Home, releases: Releases, runs: Runs, exclusive: bool) -> None:
        self._home = home
        self._releases = releases
        self._runs = runs
        self._exclusive = exclusive

    async def now(self) -> Absence:
        """Why it is so now."""
        live = self._releases.live()
        if live is None:
            setback = self._releases.setback()
            return Absence(f"no model is live: {setback}") if setback else NOTHING_LIVE
        run = next((run for run in self._runs.active() if run.state != "queued"), None) if self._exclusive else None
        if run is None:
            return Absence(f"the engine of the live model {live} is not ready; try again in a few seconds")
        reason = f"the accelerator is taken by run {run.id}, at {run.stage}; {live} answers again after it"
        log = EventLog(self._home.runs / run.id / "events.jsonl")
        step = await asyncio.to_thread(log.newest, "step")
        if step is None or step["stage"] != run.stage:
            return Absence(reason)
        left = step["time"] + step["eta_seconds"] - time.time()
        if left <= 0:
            return Absence(reason)
        return Absence(f"{reason}, in {max(1, round(left / 60))} min at the earliest", left)
