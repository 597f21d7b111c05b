"""Runs: one row per execution of a recipe."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Iterable
from typing import Literal, cast

from appliance import api
from appliance.errors import NotFound
from appliance.train.recipe import Recipe


class Runs:
    """The queue and its history."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def new_id(self, recipe: Recipe, taken: Iterable[str] = ()) -> str:
        """The next free id: the recipe's name and a number, which no release from elsewhere has either, nor `taken`."""
        prefix = f"{recipe.name}-"
        ids = [str(row["id"]) for row in self._db.execute("SELECT id FROM runs UNION SELECT id FROM releases")]
        ids += taken
        numbers = [id.removeprefix(prefix) for id in ids if id.startswith(prefix)]
        return f"{prefix}{max((int(number) for number in numbers if number.isdigit()), default=0) + 1}"

    def add(self, id: str, recipe: Recipe) -> api.Run:
        stages = recipe.pipeline()
        self._db.execute(
            "INSERT INTO runs (id, recipe, base, state, stages, stage, promote, created)"
            " VALUES (?, ?, ?, 'queued', ?, ?, ?, ?)",
            (id, recipe.name, recipe.base, json.dumps(stages), stages[0], recipe.promote, time.time()),
        )
        return self.get(id)

    def get(self, id: str) -> api.Run:
        """Raises NotFound."""
        row = self._db.execute("SELECT * FROM runs WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound("no_such_run", f"there is no run {id!r}", "see `appliance runs`")
        return _run(row)

    def all(self) -> list[api.Run]:
        """Newest first."""
        return [_run(row) for row in self._db.execute("SELECT * FROM runs ORDER BY rowid DESC")]

    def newest(self, most: int, before: str | None = None) -> list[api.Run]:
        """At most so many, newest first; those that were queued before the run `before`. Raises NotFound."""
        end = self._position(before) if before else sys.maxsize
        query = "SELECT * FROM runs WHERE rowid < ? ORDER BY rowid DESC LIMIT ?"
        return [_run(row) for row in self._db.execute(query, (end, most))]

    def _position(self, id: str) -> int:
        """Where a run stands in the order in which all were queued, whatever the clock said then."""
        self.get(id)
        (position,) = self._db.execute("SELECT rowid FROM runs WHERE id = ?", (id,)).fetchone()
        return int(position)

    def active(self) -> list[api.Run]:
        """Runs that still have something to do, oldest first."""
        marks = ", ".join("?" * len(api.ACTIVE))
        query = f"SELECT * FROM runs WHERE state IN ({marks}) ORDER BY rowid"
        return [_run(row) for row in self._db.execute(query, api.ACTIVE)]

    def losses(self, id: str) -> int:
        """How often the present stage's process ended without a result."""
        (losses,) = self._db.execute("SELECT losses FROM runs WHERE id = ?", (id,)).fetchone()
        return int(losses)

    def promotes(self, id: str) -> bool:
        """Whether the run's release goes live by itself."""
        (promote,) = self._db.execute("SELECT promote FROM runs WHERE id = ?", (id,)).fetchone()
        return bool(promote)

    def set_promotes(self, id: str, promotes: bool) -> None:
        """Whether the run's release is to go live by itself."""
        self._db.execute("UPDATE runs SET promote = ? WHERE id = ?", (promotes, id))

    def mark_running(self, id: str) -> None:
        self._db.execute(
            "UPDATE runs SET state = 'running', started = coalesce(started, ?) WHERE id = ?",
            (time.time(), id),
        )

    def mark_stopping(self, id: str, wish: api.StopWish = "pause") -> None:
        """Let it stop, whatever its state. A wish to discard is taken back by nothing but queueing it again."""
        self._db.execute(
            "UPDATE runs SET state = 'stopping', wish = CASE WHEN wish = 'discard' THEN wish ELSE ? END WHERE id = ?",
            (wish, id),
        )

    def wish_to_keep(self, id: str) -> None:
        """Let its training stage end at the next step, and the run go on with what that has learnt."""
        self._db.execute("UPDATE runs SET wish = 'keep' WHERE id = ?", (id,))

    def wish(self, id: str) -> api.StopWish | Literal[""]:
        """What a person has wished for the run, and is not done yet."""
        (wish,) = self._db.execute("SELECT wish FROM runs WHERE id = ?", (id,)).fetchone()
        return cast("api.StopWish | Literal['']", wish)

    def queue_again(self, id: str) -> None:
        """Back to the queue by a person's wish: the count of losses starts anew."""
        self._db.execute(
            "UPDATE runs SET state = 'queued', finished = NULL, losses = 0, wish = '', reason = '', next = ''"
            " WHERE id = ?",
            (id,),
        )

    def lose(self, id: str) -> None:
        """The stage's process is gone without a result."""
        self._db.execute("UPDATE runs SET losses = losses + 1 WHERE id = ?", (id,))

    def advance(self, id: str, stage: str) -> None:
        self._db.execute(
            "UPDATE runs SET stage = ?, losses = 0, wish = CASE WHEN wish = 'keep' THEN '' ELSE wish END WHERE id = ?",
            (stage, id),
        )

    def finish(self, id: str, state: api.RunState, reason: str = "", next: str = "") -> None:
        self._db.execute(
            "UPDATE runs SET state = ?, finished = ?, wish = '', reason = ?, next = ? WHERE id = ?",
            (state, time.time(), reason, next, id),
        )


def _run(row: sqlite3.Row) -> api.Run:
    columns: Iterable[str] = row.keys()
    values = {name: row[name] for name in columns if name in api.Run.model_fields}
    return api.Run.model_validate({**values, "stages": json.loads(row["stages"])})
