"""Checkpoints that are whole or do not count: manifest.json is written last, and checked before use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from appliance.home import fsync_tree, write_json

MANIFEST = "manifest.json"


def seal(checkpoint: Path) -> None:
    """Make the files of `checkpoint` durable, then list them with their sizes in its manifest."""
    fsync_tree(checkpoint)
    write_json(checkpoint / MANIFEST, {"files": _sizes(checkpoint)})


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that the manifest lists is there in its full size."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(listed) and listed == _sizes(checkpoint)


def newest_whole(stage: Path) -> Path | None:
    """The latest whole checkpoint in `stage`; the broken ones are deleted."""
    newest = None
    for checkpoint in sorted(stage.glob("checkpoint-*"), key=step_of):
        if is_whole(checkpoint):
            newest = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return newest


def step_of(checkpoint: Path) -> int:
    """Number of optimiser steps that `checkpoint` holds."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path != checkpoint / MANIFEST
    }
