"""The files that a person means by paths, folders, patterns and `-`."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput

_DATASET_INFO = "dataset_info.json"
_METADATA = frozenset({_DATASET_INFO, "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"})
"""What stands beside the data in folders that tools have written."""
EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


@dataclass(frozen=True)
class SourceFile:
    """A file to import; `path` None: standard input."""

    path: Path | None
    name: str
    about: dict[str, Any] = field(default_factory=dict)
    """The entry that a dataset_info.json of LLaMA-Factory beside it has for it."""


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
            files = [SourceFile(match, _below(match, name)) for match in matches if match.is_file()]
            if not files:
                raise InvalidInput("unreadable_file", f"{name} does not exist", "check the path")
            found += files
    if sum(file.path is None for file in found) > 1:
        raise InvalidInput("stdin_twice", "standard input can be read once only", "name - once")
    if type:
        found = [SourceFile(file.path, f"{file.name}.{type.lstrip('.')}") for file in found]
    return [replace(file, about=_entry(file.path)) if file.path else file for file in found]


def _below(file: Path, pattern: str) -> str:
    """A file's name below the folders that its pattern names."""
    fixed = [part for part in Path(pattern).parts if not glob.has_magic(part)]
    common = next(
        (at for at, (one, other) in enumerate(zip(fixed, file.parts, strict=False)) if one != other), len(fixed)
    )
    return str(Path(*file.parts[min(common, len(file.parts) - 1) :]))


def _entry(file: Path) -> dict[str, Any]:
    try:
        found = json.loads((file.parent / _DATASET_INFO).read_bytes())
    except (OSError, ValueError):
        return {}
    entries = found.values() if isinstance(found, dict) else ()
    return next((one for one in entries if isinstance(one, dict) and one.get("file_name") == file.name), {})


def _is_data(path: Path) -> bool:
    passed_over = any(part.startswith((".", "cache-")) for part in path.parts) or path.name in _METADATA
    return not passed_over and any(suffix.lower() in EXTENSIONS for suffix in path.suffixes[-2:])
