"""Names of datasets. What a dataset holds is on disk, under its id."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from appliance import api
from appliance.errors import NotFound


class Datasets:
    """Which dataset goes by which name: that of the newest import under it."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def record(self, report: dict[str, Any]) -> api.Dataset:
        """Point the name of an import at its dataset."""
        self._db.execute(
            "INSERT OR REPLACE INTO datasets (name, id, kind, rows, created) VALUES (?, ?, ?, ?, ?)",
            (report["name"], report["id"], report["kind"], report["kept"], time.time()),
        )
        return self.find(report["name"])

    def find(self, name: str) -> api.Dataset:
        """The dataset with this name, or else this id. Raises NotFound."""
        row = self._db.execute(
            "SELECT * FROM datasets WHERE name = ?1 OR id = ?1 ORDER BY name = ?1 DESC LIMIT 1", (name,)
        ).fetchone()
        if row is None:
            raise NotFound(
                "no_such_dataset",
                f"there is no dataset {name!r}",
                "import it: `appliance data import FILE --name NAME`",
            )
        return api.Dataset.model_validate(dict(row))

    def names(self, id: str) -> list[str]:
        """What a dataset is called."""
        return [row["name"] for row in self._db.execute("SELECT name FROM datasets WHERE id = ?", (id,))]

    def forget(self, name: str) -> None:
        """Take a name away."""
        self._db.execute("DELETE FROM datasets WHERE name = ?", (name,))

    def all(self) -> list[api.Dataset]:
        """Newest first."""
        rows = self._db.execute("SELECT * FROM datasets ORDER BY created DESC, rowid DESC")
        return [api.Dataset.model_validate(dict(row)) for row in rows]
