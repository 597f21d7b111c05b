"""What was answered here, and what people say about it."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from appliance import api
from appliance.store.database import transaction

NEWEST_KEPT = 100_000
"""Answers that feedback can still be given on. A number bounds the file, some 15 MB, whatever the load; feedback comes
within minutes, and at one answer a second so many are a day."""


@dataclass(frozen=True)
class Answer:
    """One that was given here: its id, the release, the id of the API key that asked (an operator has none)."""

    id: str
    release: str
    key: str
    time: float


@dataclass(frozen=True)
class Remark:
    """What somebody says about the answer `id`. `correction`: what it should have been."""

    id: str
    rating: api.Rating
    correction: str | None = None
    comment: str | None = None


class Feedback:
    """The newest answers and all that feedback was given on; of the feedback on an answer, the newest."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(self, answers: Iterable[Answer]) -> None:
        """Remember answers, and forget the oldest that nobody has said anything about: both or neither."""
        with transaction(self._db):
            self._db.executemany(
                "INSERT OR IGNORE INTO requests (id, release, key, answered) VALUES (?, ?, ?, ?)",
                ((answer.id, answer.release, answer.key, answer.time) for answer in answers),
            )
            self._db.execute(
                "DELETE FROM requests WHERE position <= (SELECT max(position) FROM requests) - ?"
                " AND id NOT IN (SELECT request FROM feedback)",
                (NEWEST_KEPT,),
            )

    def give(self, remark: Remark, key: str) -> bool:
        """Keep what the holder of `key` says, in place of what was said before; False: it got no such answer."""
        given = self._db.execute(
            "INSERT OR REPLACE INTO feedback (request, rating, correction, comment, given)"
            " SELECT id, ?, ?, ?, ? FROM requests WHERE id = ? AND key = ?",
            (remark.rating, remark.correction, remark.comment, time.time(), remark.id, key),
        )
        return given.rowcount > 0

    def ratings(self, release: str, since: float) -> Counter[api.Rating]:
        """How often answers that `release` has given since then were rated what."""
        rows = self._db.execute(
            "SELECT rating, count(*) AS answers FROM feedback JOIN requests ON id = request"
            " WHERE given >= ?1 AND answered >= ?1 AND release = ?2 GROUP BY rating",
            (since, release),
        )
        return Counter({row["rating"]: row["answers"] for row in rows})
