"""Releases, and the history of which was live."""

from __future__ import annotations

import json
import sqlite3
import time

from appliance import api
from appliance.errors import Conflict, NotFound
from appliance.store.database import transaction

_COUNTING = "deployments WHERE failed = '' ORDER BY position DESC"


class Releases:
    """The newest row of `deployments` is the live release; the rows before it are what a rollback returns to.

    A row says when its release first answered as the live one, or why it never did; the latter do not count.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(
        self, id: str, base: str, state: api.ReleaseState, reason: str, gates: dict[str, bool], promote: bool
    ) -> None:
        """Record a finished release and, with `promote` and if verified, make it live: both or neither."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO releases (id, base, state, created, reason, gates) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO NOTHING",
                (id, base, state, time.time(), reason, json.dumps(gates)),
            )
            if promote and state == "verified" and self.live() != id:
                self._deploy(id)

    def get(self, id: str) -> api.Release:
        """Raises NotFound."""
        row = self._db.execute("SELECT * FROM releases WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound("no_such_release", f"there is no release {id!r}", "see `appliance releases`")
        return _release(row, self.live())

    def all(self) -> list[api.Release]:
        """Newest first."""
        live = self.live()
        rows = self._db.execute("SELECT * FROM releases ORDER BY created DESC, rowid DESC")
        return [_release(row, live) for row in rows]

    def live(self) -> str | None:
        """Id of the release that is wanted live."""
        row = self._db.execute(f"SELECT release FROM {_COUNTING} LIMIT 1").fetchone()
        return None if row is None else str(row["release"])

    def fallback(self) -> str | None:
        """What was live before, as long as the live release has not answered yet; None: there is no way back."""
        rows = self._db.execute(f"SELECT release, answered FROM {_COUNTING} LIMIT 2").fetchall()
        return str(rows[1]["release"]) if len(rows) == 2 and rows[0]["answered"] is None else None

    def mark_answered(self) -> None:
        """Record that the live release answers, if it is the first time."""
        self._db.execute(
            "UPDATE deployments SET answered = ? WHERE answered IS NULL"
            f" AND position = (SELECT position FROM {_COUNTING} LIMIT 1)",
            (time.time(),),
        )

    def give_up(self, id: str, reason: str) -> None:
        """Undo the going live of a release that has never answered since: what was live before is so again."""
        self._db.execute(
            "UPDATE deployments SET failed = ? WHERE failed = '' AND answered IS NULL AND release = ?", (reason, id)
        )

    def setback(self) -> str:
        """Why the last release that was to go live did not; empty where it did."""
        row = self._db.execute("SELECT release, failed FROM deployments ORDER BY position DESC LIMIT 1").fetchone()
        return f"{row['release']} did not go live: {row['failed']}" if row and row["failed"] else ""

    def accept(self, id: str, reason: str) -> None:
        """Record that a refused release counts as verified. Its gates stay as they were measured."""
        self._db.execute("UPDATE releases SET state = 'verified', reason = ? WHERE id = ?", (reason, id))

    def promote(self, id: str) -> api.Release:
        """Make a verified release live. Raises NotFound, or Conflict for a refused one."""
        if not self.require_verified(id).live:
            self._deploy(id)
        return self.get(id)

    def require_verified(self, id: str) -> api.Release:
        """The release. Raises NotFound, or Conflict for a refused one."""
        release = self.get(id)
        if release.state != "verified":
            raise Conflict(
                "refused_release",
                f"release {id} was refused: {release.reason}",
                f"see `appliance releases {id}`; a refused release is not served",
            )
        return release

    def wanted(self) -> set[str]:
        """Those that are to answer: the live release and the canary."""
        return self._newest_and_canary(1)

    def needed(self) -> set[str]:
        """The live release, the one that a rollback returns to, and the canary."""
        return self._newest_and_canary(2)

    def remove(self, id: str) -> None:
        """Forget a release that is not needed, and that it was ever live."""
        with transaction(self._db):
            self._db.execute("DELETE FROM deployments WHERE release = ?", (id,))
            self._db.execute("DELETE FROM releases WHERE id = ?", (id,))
            self._db.execute(
                "DELETE FROM deployments WHERE position IN (SELECT position FROM (SELECT position, release,"
                " lag(release) OVER (ORDER BY position) AS before FROM deployments WHERE failed = '')"
                " WHERE release = before)"
            )

    def rollback(self) -> api.Release:
        """Make the release that was live before the live one live again. Raises Conflict where there is none."""
        rows = self._db.execute(f"SELECT position, release FROM {_COUNTING} LIMIT 2").fetchall()
        if len(rows) < 2:
            raise Conflict(
                "nothing_to_roll_back",
                "no release was live before this one",
                "promote one: `appliance promote ID`",
            )
        self._db.execute("DELETE FROM deployments WHERE position >= ?", (rows[0]["position"],))
        return self.get(rows[1]["release"])

    def _newest_and_canary(self, count: int) -> set[str]:
        rows = self._db.execute(
            f"SELECT release FROM (SELECT release FROM {_COUNTING} LIMIT ?)"
            " UNION SELECT release FROM canaries WHERE ended IS NULL",
            (count,),
        )
        return {str(row["release"]) for row in rows}

    def _deploy(self, id: str) -> None:
        self._db.execute("INSERT INTO deployments (release, since) VALUES (?, ?)", (id, time.time()))


def _release(row: sqlite3.Row, live: str | None) -> api.Release:
    return api.Release(
        id=row["id"],
        base=row["base"],
        state=row["state"],
        created=row["created"],
        live=row["id"] == live,
        reason=row["reason"],
        gates=json.loads(row["gates"]),
    )
