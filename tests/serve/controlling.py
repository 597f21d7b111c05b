"""The control API in one process, with nothing that works on its runs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import httpx

from appliance.canary import Comparison
from appliance.client import Client
from appliance.home import Home
from appliance.settings import Settings
from appliance.store.database import open_database
from appliance.store.keys import Keys
from appliance.supervisor.supervisor import Supervisor
from appliance.traffic import Traffic
from appliance.train.recipe import Recipe
from serve.control.app import control_app
from serve.control.models import Pulls
from serve.engines.transformers import TransformersEngine
from serve.gateway.edge import Gateway
from serve.gateway.ledger import Ledger


class Nobody:
    """A frontage that lets nobody answer."""

    def route(self, model: str | None, address: str, beneath: str | None) -> None: ...

    def hold(self, on: bool) -> None: ...

    def route_canary(self, release: str, address: str, share: float, comparison: Comparison) -> None: ...

    def end_canary(self) -> None: ...

    async def drained(self, address: str, timeout: float) -> None: ...


class Control:
    """The control API of a home at `root`; its supervisor does not tick."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.home.create()
        self.db: sqlite3.Connection = open_database(self.home.database)
        keys = Keys(self.db)
        engine = TransformersEngine(Settings())
        self.supervisor = Supervisor(self.home, self.db, engine, Nobody(), exclusive=False)
        chat = Gateway(keys.authenticate, Ledger(Traffic(self.home.traffic)), engine).operator
        self.pulls = Pulls(self.home)
        app = control_app(self.home, self.db, self.supervisor, keys, self.pulls, "http://127.0.0.1:1/v1", chat)
        self.client = Client(root / "none", httpx.ASGITransport(app, raise_app_exceptions=False))

    def run(self, state: str) -> str:
        id = self.supervisor.runs.new_id(Recipe(name="r", base="tiny"))
        self.supervisor.runs.add(id, Recipe(name="r", base="tiny"))
        (self.home.runs / id).mkdir()
        if state != "queued":
            self.supervisor.runs.finish(id, state)  # type: ignore[arg-type]
        return id

    def model(self) -> None:
        """A base model `tiny`, of which nothing is read but its files' names."""
        folder = self.home.models / "tiny"
        folder.mkdir()
        for name, content in (("config.json", '{"a": 1}'), ("tokenizer.json", "{}"), ("chat_template.jinja", "x")):
            (folder / name).write_text(content)
        (folder / "model.safetensors").write_bytes(b"weights")
