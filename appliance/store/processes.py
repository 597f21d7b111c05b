"""Processes that the daemon starts, so that the next daemon finds them again."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

from appliance.api import EngineState
from appliance.sqlite import transaction

Kind = Literal["worker", "engine"]

_COLUMNS = "kind, owner, stage, pid, started, boot, address, mark, life"


@dataclass(frozen=True)
class ProcessRow:
    """One child process, which leads a session of its own; it is on record before it is started, with `pid` 0.

    `owner` is a run's id for a worker, a release's for an engine. `stage` is what a worker works at, `life` where in
    its life an engine is. `started` is when `pid` started, in clock ticks since the boot `boot`: together they name one
    process for ever. `mark` is in the environment of the process and of all that it starts.
    """

    kind: Kind
    owner: str
    stage: str = ""
    pid: int = 0
    started: int = 0
    boot: str = ""
    address: str = ""
    mark: str = ""
    life: EngineState | Literal[""] = ""


class Processes:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(self, row: ProcessRow) -> None:
        """Record it, in the place of what is known of this kind and owner."""
        values = (row.kind, row.owner, row.stage, row.pid, row.started, row.boot, row.address, row.mark, row.life)
        self._db.execute(f"INSERT OR REPLACE INTO processes ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def remove(self, row: ProcessRow) -> None:
        self._db.execute("DELETE FROM processes WHERE kind = ? AND owner = ?", (row.kind, row.owner))

    def replace(self, row: ProcessRow, by: ProcessRow) -> None:
        """The same process under another owner or at another place in its life: both or neither."""
        with transaction(self._db):
            self.remove(row)
            self.add(by)

    def all(self) -> list[ProcessRow]:
        return [ProcessRow(*row) for row in self._db.execute(f"SELECT {_COLUMNS} FROM processes")]
