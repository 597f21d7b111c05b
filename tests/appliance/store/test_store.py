"""The SQLite state: what is kept, and what survives."""

from __future__ import annotations

import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.errors import Conflict, InvalidInput, NotFound
from appliance.release.integrity import Seen, Stamp
from appliance.store.database import MIGRATIONS, open_database
from appliance.store.datasets import Datasets
from appliance.store.keys import Keys
from appliance.store.processes import Processes, ProcessRow
from appliance.store.releases import Proof, Releases
from appliance.store.runs import Runs
from appliance.train.recipe import Recipe, SftStage

RECIPE = Recipe(name="facts", base="tiny", promote=True, stages=(SftStage(method="sft", name="sft", dataset="d1"),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "appliance.db"


@pytest.fixture
def db(path: Path) -> sqlite3.Connection:
    return open_database(path)


def test_opening_again_keeps_what_is_there(path: Path, db: sqlite3.Connection) -> None:
    Runs(db).add("facts-1", RECIPE)
    db.close()
    assert Runs(open_database(path)).get("facts-1").recipe == "facts"


def test_it_is_durable_and_for_its_owner_alone(path: Path, db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE x (y)")
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("appliance.db*")} == {0o600}
    assert db.execute("PRAGMA synchronous").fetchone()[0] == 2, "a commit has reached the disk"
    path.chmod(0o644)
    open_database(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_writer_waits_for_another_one(path: Path, db: sqlite3.Connection) -> None:
    other = sqlite3.connect(path, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    ending = threading.Timer(0.3, other.rollback)
    ending.start()
    db.execute("CREATE TABLE x (y)")
    ending.join()
    other.close()


def test_several_may_open_a_new_one_at_once(tmp_path: Path) -> None:
    def open_it(number: int) -> None:
        for each in range(8):
            open_database(tmp_path / f"{each}.db").close()

    with ThreadPoolExecutor(6) as several:
        list(several.map(open_it, range(6)))


def test_a_newer_schema_is_refused(path: Path, db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(InvalidInput, match="newer appliance"):
        open_database(path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(InvalidInput, match="is not a database"):
        open_database(tmp_path / "x.db")


def test_run_ids_count_up_per_recipe(db: sqlite3.Connection) -> None:
    runs = Runs(db)
    assert runs.new_id(RECIPE) == "facts-1"
    runs.add("facts-1", RECIPE)
    assert runs.new_id(RECIPE) == "facts-2"
    assert runs.new_id(RECIPE.model_copy(update={"name": "fact"})) == "fact-1"


def test_a_run_goes_through_its_states(db: sqlite3.Connection) -> None:
    runs = Runs(db)
    run = runs.add("facts-1", RECIPE)
    assert (run.state, run.stage, run.stages) == ("queued", "sft", ("sft", "merge", "verify", "probe"))
    runs.mark_running(run.id)
    runs.lose(run.id)
    assert runs.losses(run.id) == 1
    runs.advance(run.id, "merge")
    assert (runs.get(run.id).stage, runs.losses(run.id)) == ("merge", 0)
    runs.finish(run.id, "failed", "no space", "free some")
    assert runs.active() == []
    runs.queue_again(run.id)
    again = runs.get(run.id)
    assert (again.state, again.stage, again.reason, again.finished) == ("queued", "merge", "", None)


def test_active_runs_come_oldest_first_and_all_newest_first(db: sqlite3.Connection) -> None:
    runs = Runs(db)
    for number in (1, 2, 3):
        runs.add(f"facts-{number}", RECIPE)
    runs.finish("facts-2", "finished")
    assert [run.id for run in runs.active()] == ["facts-1", "facts-3"]
    assert [run.id for run in runs.all()] == ["facts-3", "facts-2", "facts-1"]


def test_unknown_names_say_where_to_look(db: sqlite3.Connection) -> None:
    with pytest.raises(NotFound, match="appliance runs"):
        Runs(db).get("x")
    with pytest.raises(NotFound, match="appliance releases"):
        Releases(db).get("x")
    with pytest.raises(NotFound, match="appliance keys list"):
        Keys(db).revoke("x")
    with pytest.raises(NotFound, match="appliance data import"):
        Datasets(db).find("x")


def test_promote_and_roll_back(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    releases.add("a", "tiny", "verified", "", {"structure": True}, promote=True)
    releases.add("b", "tiny", "verified", "", {}, promote=False)
    assert releases.live() == "a"
    assert releases.promote("b").live
    assert [(release.id, release.live) for release in releases.all()] == [("b", True), ("a", False)]
    assert releases.rollback().id == "a"
    with pytest.raises(Conflict, match="no release was live before"):
        releases.rollback()
    assert releases.live() == "a"


def test_a_release_that_is_refused_later_is_no_way_back(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    for id in ("a", "b", "c"):
        releases.add(id, "tiny", "verified", "", {}, promote=True)
    releases.refuse("b", "its gates were repeated")
    assert releases.live() == "c"
    assert releases.before() == "a"
    assert releases.rollback().id == "a"


def test_a_refused_release_never_goes_live(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    releases.add("bad", "tiny", "refused", "one NaN", {"structure": False}, promote=True)
    assert releases.live() is None
    with pytest.raises(Conflict, match="was refused: one NaN"):
        releases.promote("bad")


def test_recording_a_release_twice_changes_nothing(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    for _ in range(2):
        releases.add("a", "tiny", "verified", "", {}, promote=True)
    assert len(releases.all()) == 1
    with pytest.raises(Conflict):
        releases.rollback()


def test_a_key_opens_until_it_is_revoked_and_is_not_kept(path: Path, db: sqlite3.Connection) -> None:
    keys = Keys(db)
    key = keys.create("app")
    assert keys.authenticate(key.key)
    assert not keys.authenticate(key.key + "x")
    assert not keys.authenticate("")
    assert Keys(open_database(path)).authenticate(key.key)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert key.key.encode() not in path.read_bytes()
    keys.revoke(key.id)
    assert not keys.authenticate(key.key)
    assert not keys.any_valid()
    with pytest.raises(InvalidInput):
        keys.create("  ")


def test_a_name_follows_the_newest_import(db: sqlite3.Connection) -> None:
    datasets = Datasets(db)
    for id in ("d1", "d2"):
        datasets.record({"name": "facts", "id": id, "kind": "messages", "kept": 3})
    assert datasets.find("facts").id == "d2"
    with pytest.raises(NotFound):
        datasets.find("d1")
    assert datasets.find("d2").name == "facts"


def test_processes_are_remembered(path: Path, db: sqlite3.Connection) -> None:
    worker = ProcessRow("worker", "r1", "sft", 4711, 99, "boot")
    engine = ProcessRow("engine", "r1", "", 4712, 98, "boot", "unix:/x")
    for row in (worker, engine):
        Processes(db).add(row)
    again = Processes(open_database(path))
    assert set(again.all()) == {worker, engine}
    again.remove(worker)
    assert again.all() == [engine]


def history(releases: Releases, *ids: str) -> None:
    """Releases, and which was live when."""
    for id in dict.fromkeys(ids):
        releases.add(id, "tiny", "verified", "", {}, promote=False)
    for id in ids:
        releases.promote(id)
        releases.mark_answered()


def test_a_damaged_live_release_gives_way_and_no_way_leads_back_to_it(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    history(releases, "a", "b", "a", "c")
    releases.found_damaged("c", "bits")
    assert (releases.live(), releases.successor()) == ("c", "a"), "until it is decided"
    releases.give_way("a", "it is damaged: bits")
    assert (releases.live(), releases.before(), releases.fallback()) == ("a", "b", None)
    assert releases.setback() == (
        "c is live no longer: it is damaged: bits; a is live instead"
        " — restore its files, `appliance verify c` and promote it, or train again"
    )
    with pytest.raises(Conflict, match="c is damaged: bits"):
        releases.promote("c")
    releases.found_damaged("b", "more bits")
    assert (releases.live(), releases.before(), releases.unfit().keys()) == ("a", None, {"b", "c"})
    assert releases.setback().startswith("c is live no longer"), "the other one is no setback"
    with pytest.raises(Conflict, match="no release was live before"):
        releases.rollback()


def test_what_was_verified_here_comes_before_what_comes_from_elsewhere(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    history(releases, "a")
    releases.add("elsewhere", "tiny", "verified elsewhere", "", {}, promote=False)
    history(releases, "elsewhere", "b")
    releases.found_damaged("b", "bits")
    assert releases.successor() == "a"
    releases.found_damaged("a", "bits")
    assert releases.successor() == "elsewhere"


def test_the_newest_verified_release_comes_after_those_that_were_live(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    history(releases, "a")
    for id, state in (("b", "verified"), ("c", "verified"), ("d", "refused"), ("e", "verified"), ("f", "verified")):
        releases.add(id, "tiny", state, "", {}, promote=False)  # type: ignore[arg-type]
    releases.promote("e")
    releases.give_up("e", "its engine does not start")
    releases.found_damaged("f", "bits")
    expected = ["c", "b", None]
    for to in expected:
        live = releases.live()
        assert live
        releases.found_damaged(live, "bits")
        assert releases.successor() == to
        releases.give_way(to, "it is damaged: bits")
        assert releases.live() == to
        what = "is live no longer" if live == "a" else "did not go live"
        assert releases.setback().startswith(f"{live} {what}: it is damaged: bits")
    assert "no other verified release is whole" in releases.setback()


def test_a_release_that_is_found_whole_again_is_not_live_by_itself(db: sqlite3.Connection) -> None:
    releases = Releases(db)
    history(releases, "a", "b")
    releases.found_damaged("b", "bits")
    releases.give_way("a", "it is damaged: bits")
    seen = {"x": Seen(Stamp(1, 2, 3, 4), "0")}
    releases.found_whole("b", Proof("hash", seen))
    assert releases.proof("b") == Proof("hash", seen)
    assert releases.live() == "a"
    assert releases.promote("b").live
    assert releases.setback() == ""
    releases.found_damaged("b", "bits")
    assert releases.proof("b") == Proof("hash", {})


def test_what_is_written_is_on_the_disk_and_who_comes_second_waits(db: sqlite3.Connection) -> None:
    (synchronous,) = db.execute("PRAGMA synchronous").fetchone()
    (patience,) = db.execute("PRAGMA busy_timeout").fetchone()
    (journal,) = db.execute("PRAGMA journal_mode").fetchone()
    assert (synchronous, patience, journal) == (2, 5000, "wal"), "2: FULL"
