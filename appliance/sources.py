"""The files that a person means by paths, folders, patterns and `-`."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import InvalidInput

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class SourceFile:
    """A file to import; `path` None: standard input."""

    path: Path | None
    name: str


def find_sources(given: Sequence[str], type: str | None = None) -> list[SourceFile]:
    """The files that `given` name, in order, those of a folder or a pattern sorted by name.

    `type` is an extension (csv, jsonl.gz) for files whose name has none that tells. Raises InvalidInput for a name
    that nothing goes by.
    """
    found: list[SourceFile] = []
    for name in given:
        path = Path(name)
        if name == "-":
            found.append(SourceFile(None, "stdin"))
        elif path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_data(file.relative_to(path))]
            if not inside:
                raise InvalidInput("no_files", f"the folder {name} holds no data files", f"use {', '.join(EXTENSIONS)}")
            found += [SourceFile(file, str(file.relative_to(path))) for file in inside]
        elif path.exists():
            if not path.is_file():
                raise InvalidInput(
                    "unreadable_file", f"{name} is no file", "name a file, a folder, or - for standard input"
                )
            found.append(SourceFile(path, path.name))
        else:
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
            files = [SourceFile(match, match.name) for match in matches if match.is_file()]
            if not files:
                raise InvalidInput("unreadable_file", f"{name} does not exist", "check the path")
            found += files
    if sum(file.path is None for file in found) > 1:
        raise InvalidInput("stdin_twice", "standard input can be read once only", "name - once")
    if type:
        found = [SourceFile(file.path, f"{file.name}.{type.lstrip('.')}") for file in found]
    return found


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and any(suffix.lower() in EXTENSIONS for suffix in path.suffixes[-2:])
