"""Feedback on record."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from appliance.store import feedback as module
from appliance.store.database import MIGRATIONS, open_database, transaction
from appliance.store.feedback import Answer, Feedback, Remark


@pytest.fixture
def db(tmp_path: Path) -> sqlite3.Connection:
    return open_database(tmp_path / "appliance.db")


def answers(*ids: str, release: str = "r1", key: str = "k1", at: float = 100.0) -> list[Answer]:
    return [Answer(id, release, key, at) for id in ids]


def test_what_is_said_of_an_answer_outlasts_the_daemon(db: sqlite3.Connection, tmp_path: Path) -> None:
    Feedback(db).add(answers("a", "b"))
    assert Feedback(db).give(Remark("a", "bad", "Forty-two.", "it is wrong"), "k1")
    db.close()
    again = open_database(tmp_path / "appliance.db")
    (row,) = again.execute("SELECT request, rating, correction, comment FROM feedback")
    assert tuple(row) == ("a", "bad", "Forty-two.", "it is wrong")
    assert Feedback(again).give(Remark("b", "good"), "k1"), "the answers are known still"


@pytest.mark.parametrize(("id", "key"), [("a", "k2"), ("a", ""), ("b", "k1"), ("", "k1")])
def test_only_who_got_the_answer_may_say_something(db: sqlite3.Connection, id: str, key: str) -> None:
    Feedback(db).add(answers("a"))
    assert not Feedback(db).give(Remark(id, "good"), key)
    assert Feedback(db).ratings("r1", 0) == {}


def test_the_newest_takes_the_place_of_what_was_said_before(db: sqlite3.Connection) -> None:
    feedback = Feedback(db)
    feedback.add(answers("a"))
    feedback.give(Remark("a", "bad", "Forty-two.", "wrong"), "k1")
    feedback.give(Remark("a", "good"), "k1")
    assert feedback.ratings("r1", 0) == {"good": 1}
    assert tuple(db.execute("SELECT correction, comment FROM feedback").fetchone()) == (None, None)


def test_ratings_are_those_of_a_releases_answers_since_a_time(db: sqlite3.Connection) -> None:
    feedback = Feedback(db)
    since = time.time() - 60
    feedback.add(answers("a", "b", "c", at=since + 1))
    feedback.add(answers("old", at=since - 1))
    feedback.add(answers("other", release="r2", at=since + 1))
    for id in ("a", "b", "old", "other"):
        feedback.give(Remark(id, "bad"), "k1")
    feedback.give(Remark("c", "good"), "k1")
    assert feedback.ratings("r1", since) == {"bad": 2, "good": 1}
    assert feedback.ratings("r2", since) == {"bad": 1}
    assert feedback.ratings("r1", time.time() + 1) == {}


def test_the_newest_answers_are_kept_and_those_with_feedback(
    db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEWEST_KEPT", 3)
    feedback = Feedback(db)
    feedback.add(answers("a", "b"))
    feedback.give(Remark("a", "bad"), "k1")
    for ids in (("c", "d"), ("e",), ("e", "f")):
        feedback.add(answers(*ids))
    assert [row["id"] for row in db.execute("SELECT id FROM requests ORDER BY position")] == ["a", "d", "e", "f"]
    assert feedback.give(Remark("a", "good"), "k1")


def test_a_transaction_lasts_as_a_whole_or_not_at_all(db: sqlite3.Connection) -> None:
    def insert_twice() -> None:
        with transaction(db):
            for _ in range(2):
                db.execute("INSERT INTO requests (id, release, key, answered) VALUES ('a', 'r1', 'k1', 0)")

    with pytest.raises(sqlite3.IntegrityError):
        insert_twice()
    assert db.execute("SELECT count(*) FROM requests").fetchone()[0] == 0
    assert not db.in_transaction


def test_an_older_database_gets_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = sqlite3.connect(path)
    old.executescript(f"{''.join(MIGRATIONS[:3])} PRAGMA user_version = 3;")
    old.close()
    Feedback(open_database(path)).add(answers("a"))
