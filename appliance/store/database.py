"""The database: opening it, and its schema as a list of migrations that only grows."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from appliance.errors import InvalidInput
from appliance.home import disk_error

MIGRATIONS = (
    """
    CREATE TABLE datasets (
        name TEXT PRIMARY KEY, id TEXT NOT NULL, kind TEXT NOT NULL, rows INTEGER NOT NULL, created REAL NOT NULL
    );
    CREATE TABLE runs (
        id TEXT PRIMARY KEY, recipe TEXT NOT NULL, base TEXT NOT NULL, state TEXT NOT NULL, stages TEXT NOT NULL,
        stage TEXT NOT NULL, promote INTEGER NOT NULL, created REAL NOT NULL, started REAL, finished REAL,
        losses INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', next TEXT NOT NULL DEFAULT ''
    );
    CREATE TABLE releases (
        id TEXT PRIMARY KEY, base TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
        reason TEXT NOT NULL DEFAULT '', gates TEXT NOT NULL DEFAULT '{}'
    );
    CREATE TABLE deployments (
        position INTEGER PRIMARY KEY AUTOINCREMENT, release TEXT NOT NULL REFERENCES releases(id), since REAL NOT NULL
    );
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, prefix TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
        created REAL NOT NULL, revoked REAL
    );
    CREATE TABLE processes (
        kind TEXT NOT NULL, owner TEXT NOT NULL, stage TEXT NOT NULL, pid INTEGER NOT NULL, started INTEGER NOT NULL,
        boot TEXT NOT NULL, address TEXT NOT NULL DEFAULT '', PRIMARY KEY (kind, owner)
    );
    """,
    """
    CREATE TABLE canaries (
        position INTEGER PRIMARY KEY AUTOINCREMENT, release TEXT NOT NULL REFERENCES releases(id) ON DELETE CASCADE,
        live TEXT NOT NULL, share REAL NOT NULL, since REAL NOT NULL, ended REAL,
        outcome TEXT NOT NULL DEFAULT 'under way', reason TEXT NOT NULL DEFAULT '', figures TEXT NOT NULL DEFAULT '[]'
    );
    CREATE UNIQUE INDEX one_canary ON canaries (ended IS NULL) WHERE ended IS NULL;
    """,
    """
    ALTER TABLE deployments ADD COLUMN answered REAL;
    ALTER TABLE deployments ADD COLUMN failed TEXT NOT NULL DEFAULT '';
    UPDATE deployments SET answered = since;
    """,
    """
    CREATE TABLE unmerged (
        position INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
        live TEXT NOT NULL REFERENCES releases(id) ON DELETE CASCADE, since REAL NOT NULL, ended REAL,
        reason TEXT NOT NULL DEFAULT ''
    );
    CREATE UNIQUE INDEX one_unmerged ON unmerged (ended IS NULL) WHERE ended IS NULL;
    """,
    """
    CREATE TABLE requests (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, release TEXT NOT NULL, key TEXT NOT NULL,
        answered REAL NOT NULL
    );
    CREATE TABLE feedback (
        request TEXT PRIMARY KEY REFERENCES requests(id), rating TEXT NOT NULL, correction TEXT, comment TEXT,
        given REAL NOT NULL
    );
    CREATE INDEX feedback_given ON feedback (given);
    """,
    """
    ALTER TABLE releases ADD COLUMN manifest_sha256 TEXT NOT NULL DEFAULT '';
    ALTER TABLE releases ADD COLUMN seen TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE releases ADD COLUMN damage TEXT NOT NULL DEFAULT '';
    """,
    """
    ALTER TABLE releases ADD COLUMN note TEXT NOT NULL DEFAULT '';
    """,
    """
    ALTER TABLE processes ADD COLUMN mark TEXT NOT NULL DEFAULT '';
    ALTER TABLE processes ADD COLUMN life TEXT NOT NULL DEFAULT '';
    ALTER TABLE runs ADD COLUMN wish TEXT NOT NULL DEFAULT '';
    """,
)


def open_database(path: Path) -> sqlite3.Connection:
    """Open (or create) the state in WAL mode and bring its schema up to date.

    Raises InvalidInput for a file that is no database or is of a newer version.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA busy_timeout = 5000")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise InvalidInput(
                "newer_database",
                f"{path} was written by a newer appliance",
                "upgrade the appliance, or use another home",
            )
        for number in range(version, len(MIGRATIONS)):
            connection.executescript(f"BEGIN; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
    except sqlite3.OperationalError as error:
        raise disk_error(OSError(28 if "full" in str(error) else 13, str(error)), path) from error
    except sqlite3.DatabaseError as error:
        raise InvalidInput(
            "bad_database",
            f"{path} is not a database of the appliance: {error}",
            "move it away, or use another home",
        ) from error
    return connection


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """What is done in it lasts as a whole, or where it raises not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
