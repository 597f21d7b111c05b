"""A box with a real daemon whose engines invent their answers."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from box import Box

from appliance.home import Home, sha256, write_json
from appliance.release.manifest import MANIFEST, Manifest
from appliance.store.database import open_database
from appliance.store.releases import Releases

SERVE = (sys.executable, str(Path(__file__).parent / "invented_daemon.py"))


def write_release(home: Home, id: str) -> str:
    """A release that holds nothing but its manifest, whose hash is returned."""
    nothing: dict[str, Any] = {}
    manifest = Manifest(
        release=id,
        state="verified",
        reason="all 5 gates passed",
        created=1.0,
        base="tiny",
        datasets=nothing,
        dataset_rows=nothing,
        gates=nothing,
        merge=nothing,
        stages=nothing,
        files=nothing,
        base_files=nothing,
        recipe={"name": id, "base": "tiny", "clock": "2026-01-01"},
        recipe_sha256="",
        versions=nothing,
    )
    (home.releases / id).mkdir()
    write_json(home.releases / id / MANIFEST, asdict(manifest))
    return sha256(home.releases / id / MANIFEST)


@contextlib.asynccontextmanager
async def started(monkeypatch: pytest.MonkeyPatch, serve: tuple[str, ...]) -> AsyncIterator[Box]:
    """A daemon, started by the command `serve`, with the releases old, which answers, and new."""
    monkeypatch.setenv("APPLIANCE_CANARY_REQUESTS", "40")
    monkeypatch.setenv("APPLIANCE_LEASE", "share")
    home = Home(Path(tempfile.mkdtemp(prefix="box-")))
    home.create()
    with contextlib.closing(open_database(home.database)) as db:
        for id in ("old", "new"):
            digest = write_release(home, id)
            Releases(db).add(id, "tiny", "verified", "", {}, promote=id == "old", manifest_sha256=digest)
    box = Box(home, serve)
    box.start()
    try:
        await box.until_answers("old")
        yield box
    finally:
        await box.client.close()
        assert box.daemon is not None
        box.daemon.send_signal(signal.SIGTERM)
        box.daemon.wait(60)
        shutil.rmtree(home.root)
