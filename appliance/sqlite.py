"""Opening an SQLite database of ours: for its owner alone, durable, its schema brought up to date."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from appliance.errors import ApplianceError, Conflict, InvalidInput, NoSpace
from appliance.home import disk_error

BUSY_SECONDS = 5.0
"""How long a writer waits for another."""


def connect(path: Path, migrations: Sequence[str]) -> sqlite3.Connection:
    """Open (or create) a database in WAL mode; what is committed has reached the disk.

    Raises ApplianceError for a file that cannot be written, is no database or is of a newer version.
    """
    try:
        # SQLite gives its other files the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
        try:
            _prepare(connection, path, migrations)
        except BaseException:
            connection.close()
            raise
    except OSError as error:
        raise disk_error(error, path) from error
    except sqlite3.Error as error:
        raise database_error(error, path) from error
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if _version(connection) > len(migrations):
        raise InvalidInput(
            "newer_database", f"{path} was written by a newer appliance", "upgrade the appliance, or use another home"
        )
    while (version := _version(connection)) < len(migrations):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE; {migrations[version]} PRAGMA user_version = {version + 1}; COMMIT;"
            )
        except sqlite3.OperationalError:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            # Somebody else may have opened it at the same moment, and have been first.
            if _version(connection) == version:
                raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def database_error(error: sqlite3.Error, path: Path) -> ApplianceError:
    """The one-line error for what SQLite reports of the database at `path`."""
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return NoSpace("no_space", f"the disk under {path} is full", "free some space, then try again")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return InvalidInput("read_only", f"{path} cannot be written to: {error}", "check its owner and its disk")
        case sqlite3.SQLITE_CANTOPEN:
            return InvalidInput("cannot_open", f"{path} cannot be opened: {error}", "check its owner and its disk")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Conflict("database_locked", f"something else holds {path}", "try again; end what has it open")
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return InvalidInput(
                "bad_database",
                f"{path} is not a database of the appliance, or is damaged: {error}",
                "move it away, restore it, or use another home",
            )
        case sqlite3.SQLITE_IOERR:
            return ApplianceError("disk_failed", f"{path} cannot be read or written: {error}", "check the disk")
    return ApplianceError("database_failed", f"the database {path} does not answer: {error}", "see the daemon's log")


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
