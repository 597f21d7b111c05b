"""A full or read-only disk, a lock that another holds, a removal that broke off: said as what they are."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from controlling import Control

from appliance.errors import ApplianceError, Conflict, InvalidInput
from appliance.sources import find_sources


def fill(db: sqlite3.Connection) -> None:
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")


async def test_a_full_disk_under_the_database(control: Control) -> None:
    fill(control.db)
    with pytest.raises(ApplianceError, match=r"the disk under .* is full") as told:
        await control.client.create_key("x" * 100_000)
    assert (told.value.code, told.value.next) == ("no_space", "free some space, then try again")
    assert (await control.client.status()).version


async def test_a_database_that_is_read_only(control: Control) -> None:
    control.db.execute("PRAGMA query_only = ON")
    with pytest.raises(InvalidInput, match="cannot be written to"):
        await control.client.create_key("a")


async def test_a_lock_that_another_process_holds(control: Control) -> None:
    control.db.execute("PRAGMA busy_timeout = 0")
    with contextlib.closing(sqlite3.connect(control.home.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Conflict, match="something else holds"):
            await control.client.create_key("a")
    await control.client.create_key("a")


async def test_a_damaged_database(control: Control) -> None:
    with contextlib.closing(sqlite3.connect(control.home.database)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    control.db.close()
    control.home.database.write_bytes(b"not a database" * 1000)
    control.db = sqlite3.connect(control.home.database)
    control.supervisor.runs._db = control.db
    with pytest.raises(InvalidInput, match="is damaged"):
        await control.client.runs()


async def imported(control: Control, folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q {n}", "output": "a"}) + "\n" for n in range(3)))
    return str((await control.client.import_dataset(find_sources([str(path)]), "mine"))["id"])


async def test_a_removal_that_broke_off_is_done_again(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await imported(control, tmp_path)
    remove = shutil.rmtree

    def half(path: Path, **how: Any) -> None:
        if Path(path).exists():
            (Path(path) / "rows.jsonl").unlink()
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("serve.control.datasets.shutil.rmtree", half)
    with pytest.raises(ApplianceError):
        await control.client.remove_dataset("mine")
    monkeypatch.setattr("serve.control.datasets.shutil.rmtree", remove)
    assert not (control.home.datasets / id).exists()
    assert await control.client.datasets() == []
    assert await imported(control, tmp_path) == id
    assert (await control.client.rows("mine")).total == 3
    await control.client.remove_dataset("mine")
    assert list(control.home.datasets.iterdir()) == []


async def test_a_name_whose_rows_are_gone_can_be_taken_away(control: Control, tmp_path: Path) -> None:
    shutil.rmtree(control.home.datasets / await imported(control, tmp_path))
    with pytest.raises(ApplianceError) as told:
        await control.client.rows("mine")
    assert "owner" not in str(told.value)
    await control.client.remove_dataset("mine")
    assert await control.client.datasets() == []


async def test_the_order_of_runs_is_that_in_which_they_were_queued_whatever_the_clock_says(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hour in (12, 11, 13, 10):
        monkeypatch.setattr("appliance.store.runs.time.time", lambda hour=hour: hour * 3600.0)
        control.run("queued")
    assert [run.id for run in await control.client.runs()] == ["r-4", "r-3", "r-2", "r-1"]
    assert [run.id for run in control.supervisor.runs.active()] == ["r-1", "r-2", "r-3", "r-4"]


async def test_runs_are_read_a_page_at_a_time(control: Control) -> None:
    for _ in range(5):
        control.run("finished")
    first = await control.client.runs(limit=2)
    second = await control.client.runs(limit=2, before=first[-1].id)
    rest = await control.client.runs(limit=2, before=second[-1].id)
    assert [run.id for run in (*first, *second, *rest)] == ["r-5", "r-4", "r-3", "r-2", "r-1"]
    with pytest.raises(ApplianceError, match="there is no run"):
        await control.client.runs(before="nope")
    with pytest.raises(InvalidInput, match="limit"):
        await control.client.runs(limit=1001)
