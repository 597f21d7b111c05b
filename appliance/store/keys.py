"""API keys. A key has 256 random bits, so a plain SHA-256 of it is safe to keep."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time

from appliance import api
from appliance.errors import InvalidInput, NotFound


class Keys:
    """The keys of the chat endpoint. Digests of valid keys are held in memory: no query on the request path."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._valid: dict[str, str] = {}
        self._load()

    def create(self, name: str) -> api.NewKey:
        """Make a key; its text is returned here and never again. Raises InvalidInput for an empty name."""
        if not name.strip():
            raise InvalidInput("no_name", "a key needs a name", "say who will use it")
        key = f"sk-{secrets.token_urlsafe(32)}"
        id = secrets.token_hex(4)
        self._db.execute(
            "INSERT INTO keys (id, name, prefix, sha256, created) VALUES (?, ?, ?, ?, ?)",
            (id, name.strip(), key[:7], _digest(key), time.time()),
        )
        self._load()
        return api.NewKey(**self.get(id).model_dump(), key=key)

    def get(self, id: str) -> api.Key:
        """Raises NotFound."""
        row = self._db.execute("SELECT * FROM keys WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound("no_such_key", f"there is no key {id!r}", "see `appliance keys list`")
        return _key(row)

    def all(self) -> list[api.Key]:
        """Newest first, revoked ones included."""
        return [_key(row) for row in self._db.execute("SELECT * FROM keys ORDER BY created DESC, rowid DESC")]

    def revoke(self, id: str) -> api.Key:
        """Refuse the key from now on. Raises NotFound."""
        self.get(id)
        self._db.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", (time.time(), id))
        self._load()
        return self.get(id)

    def authenticate(self, key: str) -> str | None:
        """The id of `key` if it is one of ours and not revoked. The time of a digest's look-up tells nothing."""
        return self._valid.get(_digest(key))

    def any_valid(self) -> bool:
        return bool(self._valid)

    def _load(self) -> None:
        rows = self._db.execute("SELECT sha256, id FROM keys WHERE revoked IS NULL")
        self._valid = {row["sha256"]: row["id"] for row in rows}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _key(row: sqlite3.Row) -> api.Key:
    return api.Key(id=row["id"], name=row["name"], prefix=row["prefix"], created=row["created"], revoked=row["revoked"])
