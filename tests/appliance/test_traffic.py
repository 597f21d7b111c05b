"""The record of traffic: what is kept, for how long, and what of it is at hand."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import traffic as module
from appliance.errors import NoSpace
from appliance.sqlite import connect
from appliance.traffic import Remark, Request, Traffic

Open = Callable[..., Traffic]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.02)


@pytest.fixture
def open_traffic(tmp_path: Path) -> Iterator[Open]:
    """A writer of the record in this test's folder."""
    opened: list[Traffic] = []

    def open_traffic(**limits: Any) -> Traffic:
        opened.append(Traffic(tmp_path / "traffic.db", **limits))
        opened[-1].start()
        return opened[-1]

    yield open_traffic
    for each in opened:
        each.close()


def rows(path: Path, table: str = "requests") -> list[dict[str, Any]]:
    """What is on disk."""
    with contextlib.closing(connect(path / "traffic.db", module.MIGRATIONS)) as db:
        return [dict(row) for row in db.execute(f"SELECT * FROM {table}")]


def request(answer: str, model: str = "r1", key: str = "k1", at: float | None = None, **more: Any) -> Request:
    at = time.time() if at is None else at
    values: dict[str, Any] = {
        "id": f"req_{answer}",
        "surface": "chat",
        "key": key,
        "conversation": None,
        "asked": "live",
        "deployment": "live",
        "model": model,
        "answer": answer,
        "status": 200,
        "error": "",
        "finish": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "arrived": at,
        "sent": at,
        "first_byte": at,
        "last_byte": at,
    }
    return Request(**(values | more))


def give(traffic: Traffic, remark: Remark, key: str = "k1") -> bool:
    return traffic.give(remark, key).result(30)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_for_its_owner_alone(open_traffic: Open, tmp_path: Path) -> None:
    traffic = open_traffic()
    traffic.note(request("a"))
    give(traffic, Remark("a", "good"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("traffic.db*")}
    assert modes == {"traffic.db": 0o600, "traffic.db-wal": 0o600, "traffic.db-shm": 0o600}


def test_what_is_said_of_an_answer_outlasts_the_daemon(open_traffic: Open, tmp_path: Path) -> None:
    traffic = open_traffic()
    for id in ("a", "b"):
        traffic.note(request(id))
    assert give(traffic, Remark("a", "bad", "Forty-two.", "it is wrong"))
    traffic.close()
    (row,) = rows(tmp_path, "feedback")
    assert (row["answer"], row["rating"], row["correction"], row["comment"]) == (
        "a",
        "bad",
        "Forty-two.",
        "it is wrong",
    )
    assert give(open_traffic(), Remark("b", "good")), "the answers are known still"


@pytest.mark.parametrize(("id", "key"), [("a", "k2"), ("a", ""), ("b", "k1"), ("", "k1")])
def test_only_who_got_the_answer_may_say_something(open_traffic: Open, tmp_path: Path, id: str, key: str) -> None:
    traffic = open_traffic()
    traffic.note(request("a"))
    traffic.note(request("", id="req_refused"))
    assert not give(traffic, Remark(id, "good"), key)
    give(traffic, Remark("a", "good"))
    assert not give(traffic, Remark(id, "bad"), key)
    assert [row["rating"] for row in rows(tmp_path, "feedback")] == ["good"]


def test_the_newest_takes_the_place_of_what_was_said_before(open_traffic: Open, tmp_path: Path) -> None:
    traffic = open_traffic()
    traffic.note(request("a"))
    give(traffic, Remark("a", "bad", "Forty-two.", "wrong"))
    give(traffic, Remark("a", "good"))
    (row,) = rows(tmp_path, "feedback")
    assert (row["rating"], row["correction"], row["comment"]) == ("good", None, None)


def test_a_request_is_recorded_as_it_was_last_noted(open_traffic: Open, tmp_path: Path) -> None:
    traffic = open_traffic()
    traffic.note(request("a", status=0, finish="", at=1e9))
    until(lambda: rows(tmp_path) or traffic.note(request("a", status=0, finish="")))
    traffic.note(request("a", completion_tokens=7))
    until(lambda: [(row["status"], row["completion_tokens"]) for row in rows(tmp_path)] == [(200, 7)])


def test_ratings_are_those_of_a_models_answers_since_a_time(open_traffic: Open) -> None:
    traffic, since = open_traffic(), time.time() - 60
    for id in ("a", "b", "c"):
        traffic.note(request(id, at=since + 1))
    traffic.note(request("old", at=since - 1))
    traffic.note(request("other", model="r2", at=since + 1))
    assert traffic.ratings("r1", since) == {}
    for id in ("a", "b", "old", "other"):
        give(traffic, Remark(id, "bad"))
    give(traffic, Remark("c", "good"))
    until(lambda: traffic.ratings("r1", since) == {"bad": 2, "good": 1})
    until(lambda: traffic.ratings("r2", since) == {"bad": 1})
    assert traffic.ratings("r1", time.time() + 1) == {}
    give(traffic, Remark("a", "good"))
    until(lambda: traffic.ratings("r1", since) == {"bad": 1, "good": 2})


def test_old_requests_go_and_feedback_stays(open_traffic: Open, tmp_path: Path) -> None:
    traffic = open_traffic(days=30)
    traffic.note(request("a"))
    give(traffic, Remark("a", "bad"))
    with contextlib.closing(connect(tmp_path / "traffic.db", module.MIGRATIONS)) as db:
        db.execute("UPDATE requests SET arrived = arrived - 31 * 86400")
    traffic.note(request("b"))
    until(lambda: [row["answer"] for row in rows(tmp_path)] == ["b"])
    assert give(traffic, Remark("a", "good")), "its feedback knows whose it is"
    assert [row["rating"] for row in rows(tmp_path, "feedback")] == ["good"]
    assert not give(traffic, Remark("a", "bad"), "k2")


def test_what_it_takes_of_the_disk_is_bounded(
    open_traffic: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEWEST_FORGOTTEN", 100)
    monkeypatch.setattr(module, "FEWEST_KEPT", 5)
    traffic, size = open_traffic(gib=1 / 1024), 0
    for batch in range(20):
        for number in range(500):
            traffic.note(request(f"{batch}-{number}", conversation="c" * 200))
        until(lambda: not traffic._waiting)
        until(lambda batch=batch: any(row["answer"] == f"{batch}-499" for row in rows(tmp_path)))
        size = max(size, (tmp_path / "traffic.db").stat().st_size)
    assert size < 2 << 20
    kept = [row["answer"] for row in rows(tmp_path)]
    assert kept[-1] == "19-499"
    assert "0-0" not in kept


def test_to_forget_visits_only_what_it_forgets(tmp_path: Path) -> None:
    """Each second, and however much there is."""
    with contextlib.closing(connect(tmp_path / "traffic.db", module.MIGRATIONS)) as db:
        for where, order in (("arrived < ?", "arrived"), ("position <= ?", "position")):
            plan = db.execute(f"EXPLAIN QUERY PLAN {module._FORGET.format(where, order)}", (0, 1)).fetchall()
            said = " ".join(row["detail"] for row in plan)
            assert "INDEX requests_arrived" in said or "USING INTEGER PRIMARY KEY" in said
            assert "SCAN requests" not in said
            assert "TEMP B-TREE" not in said


def test_feedback_is_refused_where_it_alone_fills_the_disk(open_traffic: Open, tmp_path: Path) -> None:
    traffic = open_traffic(gib=0.25 / 1024)
    for number in range(4):
        traffic.note(request(f"{number}"))
    assert give(traffic, Remark("0", "bad", "x" * 200_000))
    assert give(traffic, Remark("1", "bad", "x" * 400_000))
    with pytest.raises(NoSpace):
        give(traffic, Remark("2", "bad"))
    traffic.note(request("5"))
    until(lambda: any(row["answer"] == "5" for row in rows(tmp_path)))


def test_a_damaged_record_is_said_once_and_nobody_waits(
    open_traffic: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "traffic.db").write_bytes(b"this is not a database" * 100)
    traffic = open_traffic()
    traffic.note(request("a"))
    for _ in range(3):
        with pytest.raises(Exception, match="is not a database of the appliance"):
            give(traffic, Remark("a", "bad"))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    (tmp_path / "traffic.db").unlink()
    assert give(traffic, Remark("a", "bad")), "what waited is not lost"


def test_the_writer_outlives_whatever_fails(open_traffic: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, ratings = open_traffic(), module._ratings
    failed: list[bool] = []

    def fail(*arguments: Any) -> Any:
        failed.append(True)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(module, "_ratings", fail)
    traffic.note(request("a"))
    traffic.ratings("r1", 0)
    assert give(traffic, Remark("a", "bad")), "it was written before"
    until(lambda: failed)
    monkeypatch.setattr(module, "_ratings", ratings)
    until(lambda: traffic.ratings("r1", 0) == {"bad": 1})


def test_memory_is_bounded_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    traffic = Traffic(tmp_path / "traffic.db")
    for number in range(9):
        traffic.note(request(f"{number}"))
    assert list(traffic._waiting) == ["req_6", "req_7", "req_8"]


def test_only_the_releases_asked_for_last_are_watched(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path / "traffic.db")
    for number in range(9):
        traffic.ratings(f"r{number}", 0)
    assert len(traffic._ratings) == module.MOST_WATCHED


def test_a_write_in_part_is_none(tmp_path: Path) -> None:
    def insert_twice(db: sqlite3.Connection) -> None:
        with module.transaction(db):
            for _ in range(2):
                db.execute("INSERT INTO feedback VALUES ('a', 'k', 'r1', 0, 'bad', NULL, NULL, 0)")

    with contextlib.closing(connect(tmp_path / "traffic.db", module.MIGRATIONS)) as db:
        with pytest.raises(sqlite3.IntegrityError):
            insert_twice(db)
        assert not db.in_transaction
    assert rows(tmp_path, "feedback") == []
