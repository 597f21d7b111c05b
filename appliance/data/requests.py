"""What the daemon asks of the processes that import and render data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

DROPS_RETURNED = 1000
"""Drops that a report carries when it is sent; report.json on disk has all."""


class Source(BaseModel):
    """A file to import: where it lies, and what its owner calls it."""

    path: Path
    filename: str
    about: dict[str, Any] = {}
    """The entry of a dataset_info.json beside it, which names its columns where the request does not."""


class ImportRequest(BaseModel):
    """What to import, and how."""

    files: list[Source]
    name: str
    format: str | None = None
    columns: str | None = None
    """Renames the rows' keys, as ColumnMap says."""
    base: Path | None = None
    """Directory of the base model by whose tokenizer tokens are counted."""
    max_length: int | None = None
    """Tokens a row may have in the recipe that the dataset is meant for."""
    encoding: str = "utf-8"
    """Of texts without a byte order mark."""
    ignore: list[str] = []
    """Keys of rows and messages that are as if they were not there."""
    drop_untrainable: bool = False
    """Leave out rows that `base` cannot be trained on."""
    salvage: bool = False
    """Keep the whole records of a damaged file."""
    redact: bool = False
    """Put placeholders in the place of secrets and e-mail addresses."""


class PreviewRequest(BaseModel):
    """Which rows of which dataset to render, for which base model (a directory)."""

    dataset: str
    base: Path
    offset: int
    limit: int
