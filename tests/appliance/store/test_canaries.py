"""Canaries on record."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from appliance.canary import Comparison
from appliance.errors import Conflict
from appliance.store.canaries import Canaries
from appliance.store.database import MIGRATIONS, open_database
from appliance.store.releases import Releases


@pytest.fixture
def db(tmp_path: Path) -> sqlite3.Connection:
    db = open_database(tmp_path / "appliance.db")
    for id in ("a", "b", "c"):
        Releases(db).add(id, "tiny", "verified", "", {}, promote=False)
    Releases(db).promote("a")
    return db


def test_the_canary_outlasts_the_daemon_and_what_became_of_it_too(db: sqlite3.Connection, tmp_path: Path) -> None:
    Canaries(db).start("b", "a", 0.1)
    db.close()
    canaries = Canaries(open_database(tmp_path / "appliance.db"))
    present = canaries.current()
    assert present is not None
    assert (present.release, present.live, present.share, present.outcome) == ("b", "a", 0.1, "under way")
    comparison = Comparison("a", "b")
    comparison.candidate_tally.add_answer(["stop"], {"first token": 0.5})
    canaries.end("rolled back", "it failed", comparison.figures())
    assert canaries.current() is None
    ended = Canaries(open_database(tmp_path / "appliance.db")).newest()["b"]
    assert (ended.outcome, ended.reason) == ("rolled back", "it failed")
    assert ended.figures == comparison.figures()
    assert ended.ended is not None


def test_there_is_one_canary_whose_share_may_change(db: sqlite3.Connection) -> None:
    canaries = Canaries(db)
    first = canaries.start("b", "a", 0.1)
    again = canaries.start("b", "a", 0.3)
    assert (again.share, again.since) == (0.3, first.since)
    with pytest.raises(Conflict, match="b is the canary"):
        canaries.start("c", "a", 0.1)
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("INSERT INTO canaries (release, live, share, since) VALUES ('c', 'a', 0.1, 0)")
    canaries.end("promoted", "", ())
    assert canaries.start("c", "a", 0.1).release == "c"
    assert canaries.newest()["b"].outcome == "promoted"


def test_a_release_that_was_a_canary_twice_is_known_by_the_newest(db: sqlite3.Connection) -> None:
    canaries = Canaries(db)
    for reason in ("first", "second"):
        canaries.start("b", "a", 0.1)
        canaries.end("rolled back", reason, ())
    assert canaries.newest()["b"].reason == "second"


def test_a_canary_is_needed_and_goes_with_its_release(db: sqlite3.Connection) -> None:
    canaries, releases = Canaries(db), Releases(db)
    canaries.start("b", "a", 0.1)
    releases.promote("c")
    assert (releases.wanted(), releases.needed()) == ({"b", "c"}, {"a", "b", "c"})
    releases.rollback()
    assert releases.wanted() == releases.needed() == {"a", "b"}
    canaries.end("rolled back", "", ())
    assert releases.needed() == {"a"}
    releases.remove("b")
    assert canaries.newest() == {}


def test_an_older_database_gets_its_table(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = sqlite3.connect(path)
    old.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    old.close()
    assert Canaries(open_database(path)).current() is None
