"""Canaries: the one under way, and what became of those before."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

from pydantic import TypeAdapter

from appliance import api
from appliance.errors import Conflict

_FIGURES = TypeAdapter(tuple[api.CanaryFigures, ...])


class Canaries:
    """One row for each; that of the one under way has no end. What is counted meanwhile is not kept here."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def start(self, release: str, live: str, share: float) -> api.Canary:
        """Let `release` answer a share beside `live`, or change its share. Raises Conflict beside another canary."""
        present = self.current()
        if present is None:
            self._db.execute(
                "INSERT INTO canaries (release, live, share, since) VALUES (?, ?, ?, ?)",
                (release, live, share, time.time()),
            )
        elif present.release == release:
            self._db.execute("UPDATE canaries SET share = ? WHERE ended IS NULL", (share,))
        else:
            raise Conflict(
                "canary_under_way",
                f"{present.release} is the canary",
                f"wait until it has ended, or end it: `appliance promote {present.release}` or `appliance rollback`",
            )
        current = self.current()
        assert current is not None
        return current

    def current(self) -> api.Canary | None:
        """The canary under way."""
        row = self._db.execute("SELECT * FROM canaries WHERE ended IS NULL").fetchone()
        return None if row is None else _canary(row)

    def end(self, outcome: api.CanaryOutcome, reason: str, figures: Sequence[api.CanaryFigures]) -> None:
        """Record what became of the one under way, and on what figures."""
        self._db.execute(
            "UPDATE canaries SET ended = ?, outcome = ?, reason = ?, figures = ? WHERE ended IS NULL",
            (time.time(), outcome, reason, _FIGURES.dump_json(tuple(figures)).decode()),
        )

    def newest(self) -> dict[str, api.Canary]:
        """The newest canary of each release that was ever one."""
        return {row["release"]: _canary(row) for row in self._db.execute("SELECT * FROM canaries ORDER BY position")}


def _canary(row: sqlite3.Row) -> api.Canary:
    return api.Canary(
        release=row["release"],
        live=row["live"],
        share=row["share"],
        since=row["since"],
        ended=row["ended"],
        outcome=row["outcome"],
        reason=row["reason"],
        figures=_FIGURES.validate_json(row["figures"]),
    )
