"""The schema of the state, as a list of migrations that only grows."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from appliance.sqlite import connect

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
    """The state of the appliance. Raises ApplianceError where it cannot be opened."""
    return connect(path, MIGRATIONS)
