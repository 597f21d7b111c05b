"""Releases, and the history of which was live."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass

from appliance import api
from appliance.errors import Conflict, NotFound
from appliance.release.integrity import Seen, dump_seen, load_seen
from appliance.sqlite import transaction

_COUNTING = "deployments WHERE failed = '' ORDER BY position DESC"


@dataclass(frozen=True)
class Proof:
    """What a release's files are compared with: the hash of its manifest (empty: not known yet), and the files as they
    were when all of them were found to be what it lists (empty: not yet, or not any more)."""

    manifest_sha256: str
    seen: dict[str, Seen]


class Releases:
    """The newest row of `deployments` is the live release; the rows before it are what a rollback returns to.

    A row says when its release first answered as the live one. It may also say why it never did, or may not any more;
    then it does not count.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(
        self,
        id: str,
        base: str,
        state: api.ReleaseState,
        reason: str,
        gates: dict[str, bool],
        promote: bool,
        manifest_sha256: str = "",
        created: float | None = None,
    ) -> None:
        """Record a finished release and, with `promote` and if verified, make it live: both or neither.

        `created` is when it was made, if that is not now.
        """
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO releases (id, base, state, created, reason, gates, manifest_sha256)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (id, base, state, created or time.time(), reason, json.dumps(gates), manifest_sha256),
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

    def answered(self) -> bool:
        """Whether the live release has answered since it went live, or there is none."""
        row = self._db.execute(f"SELECT answered FROM {_COUNTING} LIMIT 1").fetchone()
        return row is None or row["answered"] is not None

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
        """Why the last release that was to go live did not or is so no longer, and what now; empty where it is."""
        row = self._db.execute("SELECT * FROM deployments ORDER BY position DESC LIMIT 1").fetchone()
        if row is None or not row["failed"]:
            return ""
        id, live = row["release"], self.live()
        what = "did not go live" if row["answered"] is None else "is live no longer"
        now = f"{live} is live instead" if live else "no other verified release is whole"
        next = f"`appliance promote {id}` tries once more"
        if (release := self.get(id)).damage:
            next = f"restore its files, `appliance verify {id}` and promote it, or train again"
        elif release.state == "refused":
            next = f"see `appliance releases {id}`"
        return f"{id} {what}: {row['failed']}; {now} — {next}"

    def proof(self, id: str) -> Proof:
        """What its files are compared with. Raises NotFound."""
        self.get(id)
        row = self._db.execute("SELECT manifest_sha256, seen FROM releases WHERE id = ?", (id,)).fetchone()
        return Proof(row["manifest_sha256"], load_seen(row["seen"]))

    def found_whole(self, id: str, proof: Proof) -> None:
        """Record that its files are those that its manifest lists, as they were seen."""
        self._db.execute(
            "UPDATE releases SET damage = '', manifest_sha256 = ?, seen = ? WHERE id = ?",
            (proof.manifest_sha256, dump_seen(proof.seen), id),
        )

    def found_damaged(self, id: str, damage: str) -> None:
        """Record that they are not. No way back leads to it any more; if it is live, `give_way` is to follow."""
        with transaction(self._db):
            self._db.execute("UPDATE releases SET damage = ?, seen = '{}' WHERE id = ?", (damage, id))
            if id != self.live():
                self._withdraw(id, f"it is damaged: {damage}")

    def unfit(self) -> dict[str, str]:
        """Releases that may not be served, and why."""
        rows = self._db.execute(
            "SELECT id, state, reason, damage FROM releases WHERE damage != '' OR state = 'refused'"
        )
        return {
            row["id"]: f"it is damaged: {row['damage']}" if row["damage"] else f"it was refused: {row['reason']}"
            for row in rows
        }

    def successor(self) -> str | None:
        """What is to be live where the live release may not be: what was so before, else the newest verified one.

        Those that were verified here come before those from elsewhere. One that was to go live and did not is passed
        over, and one from elsewhere that was never live.
        """
        row = self._db.execute(
            "SELECT id FROM releases LEFT JOIN"
            " (SELECT release, max(position) AS position FROM deployments WHERE failed = '' GROUP BY release)"
            " ON release = id WHERE damage = '' AND state != 'refused' AND id IS NOT ?"
            " AND (position IS NOT NULL OR state = 'verified' AND id NOT IN"
            " (SELECT release FROM deployments WHERE failed != '' AND answered IS NULL))"
            " ORDER BY state = 'verified' DESC, position DESC, created DESC, releases.rowid DESC LIMIT 1",
            (self.live(),),
        ).fetchone()
        return None if row is None else str(row["id"])

    def give_way(self, to: str | None, reason: str) -> None:
        """The live release may not be so any more: `to` is in its place, or where that is None nothing."""
        with transaction(self._db):
            row = self._db.execute(f"SELECT release, answered FROM {_COUNTING} LIMIT 1").fetchone()
            self._withdraw(row["release"], reason)
            if to is not None and self.live() != to:
                self._deploy(to)
            self._db.execute(
                "INSERT INTO deployments (release, since, answered, failed) VALUES (?, ?, ?, ?)",
                (row["release"], time.time(), row["answered"], reason),
            )

    def unproven(self) -> frozenset[str]:
        """Releases that were verified elsewhere and have not yet been asked for their reference answers here."""
        rows = self._db.execute("SELECT id FROM releases WHERE state = 'verified elsewhere' AND note = ''")
        return frozenset(row["id"] for row in rows)

    def note(self, id: str, note: str) -> None:
        """Record what was seen of it here."""
        self._db.execute("UPDATE releases SET note = ? WHERE id = ?", (note, id))

    def passed_here(self, id: str, reason: str, note: str, gates: dict[str, bool]) -> None:
        """Record that all of its gates have passed on this box; `reason` is that of its manifest again."""
        self._db.execute(
            "UPDATE releases SET state = 'verified', reason = ?, note = ?, gates = ? WHERE id = ?",
            (reason, note, json.dumps(gates), id),
        )

    def refuse(self, id: str, reason: str, gates: dict[str, bool] | None = None) -> None:
        """Let it be refused from now on, by `gates` as they were measured here. If it is live, `give_way` follows."""
        with transaction(self._db):
            self._db.execute("UPDATE releases SET state = 'refused', reason = ? WHERE id = ?", (reason, id))
            if gates:
                self._db.execute("UPDATE releases SET gates = ? WHERE id = ?", (json.dumps(gates), id))
            if id != self.live():
                self._withdraw(id, f"it was refused: {reason}")

    def accept(self, id: str, reason: str, manifest_sha256: str) -> None:
        """Record that a refused release counts as verified. Its gates stay as they were measured."""
        self._db.execute(
            "UPDATE releases SET state = 'verified', reason = ?, manifest_sha256 = ? WHERE id = ?",
            (reason, manifest_sha256, id),
        )

    def promote(self, id: str) -> api.Release:
        """Make a verified release live. Raises NotFound, or Conflict for a refused or damaged one."""
        if not self.require_fit(id).live:
            self._deploy(id)
        return self.get(id)

    def require_fit(self, id: str) -> api.Release:
        """The release. Raises NotFound, or Conflict for one that is damaged or was refused."""
        release = self.get(id)
        if release.damage:
            raise Conflict(
                "damaged_release",
                f"release {id} is damaged: {release.damage}",
                f"restore its files and `appliance verify {id}`, import it again, or train again",
            )
        if release.state == "refused":
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
            self._join_repeats()

    def rollback(self) -> api.Release:
        """Make the release that was live before the live one live again. Raises Conflict where there is none."""
        rows = self._db.execute(f"SELECT position, release FROM {_COUNTING} LIMIT 2").fetchall()
        if len(rows) < 2:
            raise Conflict(
                "nothing_to_roll_back",
                "no release was live before this one, or none that may answer now",
                "promote one: `appliance promote ID`; `appliance releases` says which may",
            )
        self._db.execute("DELETE FROM deployments WHERE position >= ?", (rows[0]["position"],))
        return self.get(rows[1]["release"])

    def before(self) -> str | None:
        """What a rollback makes live."""
        rows = self._db.execute(f"SELECT release FROM {_COUNTING} LIMIT 2").fetchall()
        return str(rows[1]["release"]) if len(rows) == 2 else None

    def _newest_and_canary(self, count: int) -> set[str]:
        rows = self._db.execute(
            f"SELECT release FROM (SELECT release FROM {_COUNTING} LIMIT ?)"
            " UNION SELECT release FROM canaries WHERE ended IS NULL",
            (count,),
        )
        return {str(row["release"]) for row in rows}

    def _withdraw(self, id: str, reason: str) -> None:
        """Let the times when it was live count no longer."""
        self._db.execute("UPDATE deployments SET failed = ? WHERE failed = '' AND release = ?", (reason, id))
        self._join_repeats()

    def _join_repeats(self) -> None:
        """Of times that follow each other and are the same release's, leave the first: a way back leads elsewhere."""
        self._db.execute(
            "DELETE FROM deployments WHERE position IN (SELECT position FROM (SELECT position, release,"
            " lag(release) OVER (ORDER BY position) AS before FROM deployments WHERE failed = '')"
            " WHERE release = before)"
        )

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
        damage=row["damage"],
        note=row["note"],
    )
