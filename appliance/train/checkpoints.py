"""Checkpoints that are whole or absent: written under another name, made durable, renamed; and checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from appliance.data.dataset import canonical_json
from appliance.home import fsync_directory, fsync_tree, write_json
from appliance.train.recipe import Recipe

MANIFEST = "manifest.json"
KEPT = 2
"""Should the newest turn out to be damaged, the one before is used."""
_CHANGES_NO_WEIGHT = {"name", "promote", "forgetting_limit", "stages", "end"}


def origin(recipe: Recipe, name: str) -> dict[str, str]:
    """What the weights of stage `name` follow from: the hash of all that the recipe says of it, and its dataset."""
    stages = [stage.model_dump() for stage in recipe.chain(name)]
    said = {**recipe.model_dump(exclude=_CHANGES_NO_WEIGHT), "stages": stages}
    return {"recipe": hashlib.sha256(canonical_json(said)).hexdigest(), "dataset": recipe.stage(name).dataset}


@contextmanager
def saving(stage: Path, step: int, origin: dict[str, str]) -> Iterator[Path]:
    """Yield a directory in which `checkpoint-STEP` is to be written; afterwards it is one of the stage's.

    On an error or a kill the stage has the checkpoints that it had before.
    """
    temporary, final = stage / ".saving", stage / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        made = temporary / final.name
        fsync_tree(made)
        write_json(made / MANIFEST, {"step": step, **origin, "files": _files(made)})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(made, final)
        fsync_directory(stage)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for older in sorted(stage.glob("checkpoint-*"), key=step_of)[:-KEPT]:
        shutil.rmtree(older)


def newest_usable(stage: Path, origin: dict[str, str]) -> tuple[Path | None, list[str]]:
    """The latest whole checkpoint of this origin, and what is wrong with later ones, which are deleted."""
    faults: list[str] = []
    for checkpoint in sorted(stage.glob("checkpoint-*"), key=step_of, reverse=True):
        fault = fault_of(checkpoint, origin)
        if not fault:
            return checkpoint, faults
        faults.append(f"{checkpoint.name} {fault}")
        shutil.rmtree(checkpoint)
    return None, faults


def fault_of(checkpoint: Path, origin: dict[str, str]) -> str:
    """Why `checkpoint` cannot be used, as the rest of a sentence; empty where it can."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "is not whole"
    if not files or files != _files(checkpoint):
        return "is damaged"
    differing = [key for key, value in origin.items() if manifest.get(key) != value]
    return f"was trained with another {' and '.join(differing)}" if differing else ""


def step_of(checkpoint: Path) -> int:
    """Number of optimiser steps that `checkpoint` holds."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _files(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file by its name."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path != checkpoint / MANIFEST:
            with open(path, "rb") as file:
                found[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
