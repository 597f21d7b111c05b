"""What the endpoint was asked and answered, and what people say about its answers: traffic.db and its one writer.

Nobody who answers waits for this database: what is to be written waits in memory for a thread, which tries again where
the disk is slow, full or locked.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path

from appliance import api
from appliance.errors import NoSpace
from appliance.settings import Settings
from appliance.sqlite import connect, transaction

log = logging.getLogger(__name__)

WRITE_SECONDS = 1.0
"""How long a request may wait to be written down; what a kill loses."""
MOST_WAITING = 50_000
"""Requests that wait in memory while nothing can be written, the newest."""
FEWEST_KEPT = 10_000
"""Requests that stay however much of the disk feedback takes, so that more can be given."""
MOST_WATCHED = 4
"""Releases whose ratings are kept at hand: those that were asked for last."""
_FEWEST_FORGOTTEN = 1000

MIGRATIONS = (
    """
    CREATE TABLE requests (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, surface TEXT NOT NULL, key TEXT NOT NULL,
        conversation TEXT, asked TEXT NOT NULL, deployment TEXT NOT NULL, model TEXT NOT NULL, answer TEXT NOT NULL,
        status INTEGER NOT NULL, error TEXT NOT NULL, finish TEXT NOT NULL, prompt_tokens INTEGER,
        completion_tokens INTEGER, arrived REAL NOT NULL, sent REAL, first_byte REAL, last_byte REAL
    );
    CREATE INDEX requests_answer ON requests (answer) WHERE answer != '';
    CREATE INDEX requests_arrived ON requests (arrived);
    CREATE TABLE feedback (
        answer TEXT PRIMARY KEY, key TEXT NOT NULL, model TEXT NOT NULL, answered REAL NOT NULL, rating TEXT NOT NULL,
        correction TEXT, comment TEXT, given REAL NOT NULL
    );
    CREATE INDEX feedback_of ON feedback (model, answered);
    """,
)


@dataclass(frozen=True)
class Request:
    """One request as it is recorded. Times are Unix seconds; `key` is the id of the API key, empty for an operator."""

    id: str
    surface: str
    key: str
    conversation: str | None
    asked: str
    """The model that the client named."""
    deployment: str
    model: str
    """What answered."""
    answer: str
    """The id of the answer, by which its client knows it; empty: there was none."""
    status: int
    error: str
    """The code of the error that it ended with."""
    finish: str
    """Why each choice ended, with commas between."""
    prompt_tokens: int | None
    completion_tokens: int | None
    arrived: float
    sent: float | None
    first_byte: float | None
    last_byte: float | None
    """The last that had come when this was recorded: as the answer began, and at its end."""


@dataclass(frozen=True)
class Remark:
    """What somebody says about the answer `id`. `correction`: what it should have been."""

    id: str
    rating: api.Rating
    correction: str | None = None
    comment: str | None = None


class Traffic:
    """The record of traffic at `path`. Requests stay for `days`, and while all of it takes at most `gib` of the disk;
    feedback stays."""

    def __init__(self, path: Path, days: float = Settings.traffic_days, gib: float = Settings.traffic_gib) -> None:
        self._path = path
        self._days = days
        self._bytes = int(gib * (1 << 30))
        self._news = threading.Condition()
        self._waiting: dict[str, Request] = {}
        self._remarks: list[tuple[Remark, str, Future[bool]]] = []
        self._ratings: dict[tuple[str, float], Counter[api.Rating]] = {}
        self._closing = False
        self._writer = threading.Thread(target=self._write_on, name="traffic", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._writer.start()

    def close(self, seconds: float = 10.0) -> None:
        """Write what waits and end; what cannot be written by then is lost."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._writer.join(seconds)

    def note(self, request: Request) -> None:
        """Record a request, or what has become of it since it was last noted."""
        with self._news:
            if request.id not in self._waiting and len(self._waiting) >= MOST_WAITING:
                del self._waiting[next(iter(self._waiting))]
            self._waiting[request.id] = request

    def give(self, remark: Remark, key: str) -> Future[bool]:
        """Keep what the holder of `key` says, in place of what was said before; False: it got no such answer.

        It is on disk when the future is done, which raises where it could not be written.
        """
        given: Future[bool] = Future()
        with self._news:
            self._remarks.append((remark, key, given))
            self._news.notify()
        return given

    def ratings(self, model: str, since: float) -> Counter[api.Rating]:
        """How often answers that `model` has given since then were rated what, as far as the writer has looked."""
        with self._news:
            found = self._ratings.pop((model, since), None)
            if found is None:
                found = Counter()
                self._news.notify()
            self._ratings[model, since] = found
            while len(self._ratings) > MOST_WATCHED:
                del self._ratings[next(iter(self._ratings))]
            return found

    def _write_on(self) -> None:
        db: sqlite3.Connection | None = None
        failing = False
        while True:
            with self._news:
                self._news.wait(0 if self._remarks or self._closing else WRITE_SECONDS)
                requests, self._waiting = self._waiting, {}
                # Those whose giver has left before anybody looked at them are dropped.
                remarks = [remark for remark in self._remarks if remark[2].set_running_or_notify_cancel()]
                self._remarks = []
                closing = self._closing
            try:
                db = db or connect(self._path, MIGRATIONS)
                self._write(db, list(requests.values()), remarks)
                failing = False
            except Exception as error:
                if not failing:
                    log.exception("traffic could not be written down; trying again")
                failing = True
                with self._news:
                    merged = [*(requests | self._waiting).items()]
                    self._waiting = dict(merged[-MOST_WAITING:])
                for _, _, given in remarks:
                    if not given.done():
                        given.set_exception(error)
                with contextlib.suppress(sqlite3.Error):
                    if db:
                        db.close()
                db = None
            if closing:
                break
        if db:
            db.close()

    def _write(
        self, db: sqlite3.Connection, requests: list[Request], remarks: list[tuple[Remark, str, Future[bool]]]
    ) -> None:
        if requests or remarks:
            with transaction(db):
                db.executemany(_NOTE, ([getattr(request, name) for name in _COLUMNS] for request in requests))
                if remarks and _size(db) > 2 * self._bytes:
                    # Requests alone cannot have come to that.
                    raise NoSpace("traffic_full", "feedback fills its disk", "raise APPLIANCE_TRAFFIC_GIB")
                found = [_give(db, remark, key) for remark, key, _ in remarks]
                self._forget(db, len(requests))
            for (_, _, given), known in zip(remarks, found, strict=True):
                given.set_result(known)
        with self._news:
            watched = list(self._ratings)
        for model, since in watched:
            ratings = _ratings(db, model, since)
            with self._news:
                if (model, since) in self._ratings:
                    self._ratings[model, since] = ratings

    def _forget(self, db: sqlite3.Connection, written: int) -> None:
        """The requests that are too old, and of what is too much the oldest: a few at a time, but more than come."""
        most = max(_FEWEST_FORGOTTEN, 2 * written)
        before = time.time() - self._days * 86400
        db.execute(_FORGET.format("arrived < ?", "arrived"), (before, most))
        if _size(db) > self._bytes:
            db.execute(
                _FORGET.format("position <= (SELECT max(position) - ? FROM requests)", "position"), (FEWEST_KEPT, most)
            )


_FORGET = "DELETE FROM requests WHERE position IN (SELECT position FROM requests WHERE {} ORDER BY {} LIMIT ?)"
_COLUMNS = tuple(field.name for field in fields(Request))
_NOTE = (
    f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
    f" ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS)}"
)


def _size(db: sqlite3.Connection) -> int:
    """Bytes of the file that are in use."""
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _give(db: sqlite3.Connection, remark: Remark, key: str) -> bool:
    said = (remark.rating, remark.correction, remark.comment, time.time())
    again = db.execute(
        "UPDATE feedback SET rating = ?, correction = ?, comment = ?, given = ? WHERE answer = ? AND key = ?",
        (*said, remark.id, key),
    )
    if again.rowcount:
        return True
    first = db.execute(
        "INSERT INTO feedback (rating, correction, comment, given, answer, key, model, answered)"
        " SELECT ?, ?, ?, ?, answer, key, model, coalesce(first_byte, arrived) FROM requests"
        " WHERE answer = ? AND answer != '' AND key = ? ORDER BY position DESC LIMIT 1 ON CONFLICT DO NOTHING",
        (*said, remark.id, key),
    )
    return first.rowcount > 0


def _ratings(db: sqlite3.Connection, model: str, since: float) -> Counter[api.Rating]:
    rows = db.execute(
        "SELECT rating, count(*) AS answers FROM feedback WHERE model = ? AND answered >= ? GROUP BY rating",
        (model, since),
    )
    return Counter({row["rating"]: row["answers"] for row in rows})
