"""Processes that the daemon has started, so that the next daemon finds them again."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

from appliance.sqlite import transaction

Kind = Literal["worker", "engine"]

SWAPPING = "swapping"
ASLEEP = "asleep"


@dataclass(frozen=True)
class ProcessRow:
    """One child process; it leads a process group of its own.

    `owner` is a run's id for a worker, a release's for an engine. `stage` is what a worker works at, and for an engine
    `SWAPPING` while the owner's weights take the place of another's, and `ASLEEP` from when it is to sleep until then.
    `started` is when `pid` started, in clock ticks since the boot `boot`: together they name one process for ever.
    """

    kind: Kind
    owner: str
    stage: str
    pid: int
    started: int
    boot: str
    address: str = ""


class Processes:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(self, row: ProcessRow) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO processes (kind, owner, stage, pid, started, boot, address)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.kind, row.owner, row.stage, row.pid, row.started, row.boot, row.address),
        )

    def remove(self, row: ProcessRow) -> None:
        self._db.execute("DELETE FROM processes WHERE kind = ? AND owner = ?", (row.kind, row.owner))

    def replace(self, row: ProcessRow, by: ProcessRow) -> None:
        """The same process under another owner or stage: both or neither."""
        with transaction(self._db):
            self.remove(row)
            self.add(by)

    def all(self) -> list[ProcessRow]:
        rows = self._db.execute("SELECT kind, owner, stage, pid, started, boot, address FROM processes")
        return [ProcessRow(*row) for row in rows]
