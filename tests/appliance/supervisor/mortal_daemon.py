"""A supervisor on real processes that do nothing, which can be killed and started again."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine, FakeFrontage

from appliance.home import Home
from appliance.store.database import open_database
from appliance.supervisor.supervisor import Supervisor
from appliance.train.events import EventLog
from appliance.train.recipe import Recipe, SftStage, dump_recipe

WORKER = (sys.executable, str(Path(__file__).parent / "fake_worker.py"))
RECIPE = Recipe(name="facts", base="tiny", promote=True, stages=(SftStage(method="sft", name="sft", dataset="d1"),))


class Daemon:
    """A supervisor that can be killed (its memory lost, its children left) and started again."""

    def __init__(self, home: Home, exclusive: bool = False) -> None:
        self.home = home
        self.exclusive = exclusive
        self.engine = FakeEngine()
        self.frontage = FakeFrontage()
        self.db: sqlite3.Connection = open_database(home.database)
        self.start()

    def start(self) -> None:
        self.supervisor = Supervisor(
            self.home, self.db, self.engine, self.frontage, self.exclusive, drain_seconds=7, worker_command=WORKER
        )
        self.task = asyncio.create_task(self.supervisor.serve())

    async def die(self) -> None:
        self.task.cancel()
        self.supervisor.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def queue(self, recipe: Recipe = RECIPE, **behaviour: str) -> str:
        run = self.supervisor.runs.new_id(recipe)
        directory = self.home.runs / run
        directory.mkdir()
        (directory / "recipe.toml").write_text(dump_recipe(recipe))
        (directory / "behaviour.json").write_text(json.dumps(behaviour))
        self.supervisor.runs.add(run, recipe)
        self.supervisor.poke()
        return run

    async def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"{self.supervisor.runs.all()}\n{self.supervisor.engines.shown()}"
            await asyncio.sleep(0.02)

    async def until_state(self, run: str, state: str) -> None:
        await self.until(lambda: self.supervisor.runs.get(run).state == state)

    def pid(self, kind: str, owner: str) -> int:
        return next(row.pid for row in self.supervisor.processes.all() if (row.kind, row.owner) == (kind, owner))

    def running(self, kind: str) -> list[str]:
        return [row.owner for row in self.supervisor.processes.all() if row.kind == kind]

    def events(self, run: str) -> list[dict[str, Any]]:
        return EventLog(self.home.runs / run / "events.jsonl").read()

    def starts(self, run: str) -> list[str]:
        path = self.home.runs / run / "starts.txt"
        return path.read_text().split() if path.exists() else []
