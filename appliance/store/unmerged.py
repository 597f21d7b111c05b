"""Adapters that answered before their release could: the one that does, and why those before no longer do."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from appliance.errors import Conflict


@dataclass(frozen=True)
class UnmergedRow:
    """The adapter of `run`, beside the weights of the release `live`. `reason`: why it ended."""

    run: str
    live: str
    since: float
    ended: float | None
    reason: str


class UnmergedAdapters:
    """One row for each; that of the one under way has no end."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def start(self, run: str, live: str) -> None:
        """Let the adapter of `run` answer beside `live`. Raises Conflict beside another's."""
        present = self.current()
        if present and (present.run, present.live) != (run, live):
            raise Conflict(
                "adapter_under_way",
                f"the adapter of {present.run} answers, unmerged",
                "wait until its release is live, or end it: `appliance rollback`",
            )
        if present is None:
            self._db.execute("INSERT INTO unmerged (run, live, since) VALUES (?, ?, ?)", (run, live, time.time()))

    def current(self) -> UnmergedRow | None:
        """The one under way."""
        return self._one("WHERE ended IS NULL")

    def newest(self) -> UnmergedRow | None:
        """The one under way, or the last that was."""
        return self._one("")

    def end(self, reason: str) -> None:
        """Record why the one under way answers no longer."""
        self._db.execute("UPDATE unmerged SET ended = ?, reason = ? WHERE ended IS NULL", (time.time(), reason))

    def _one(self, which: str) -> UnmergedRow | None:
        query = f"SELECT run, live, since, ended, reason FROM unmerged {which} ORDER BY position DESC LIMIT 1"
        row = self._db.execute(query).fetchone()
        return None if row is None else UnmergedRow(*row)
