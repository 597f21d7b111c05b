"""An empty home, an import into it, and a tokenizer small enough to build on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from importing import Import

from appliance.data.importer import import_files
from appliance.data.requests import ImportRequest, Source
from appliance.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


@pytest.fixture
def imported(home: Home, tmp_path: Path) -> Import:
    """Import rows (as JSON Lines, or as an array into a .json name), text or bytes; returns the report."""

    def run(content: Any, filename: str = "rows.jsonl", **how: Any) -> dict[str, Any]:
        if isinstance(content, list):
            if filename.endswith(".json"):
                content = json.dumps(content)
            else:
                content = "".join(json.dumps(row) + "\n" for row in content)
        source = tmp_path / filename
        source.write_bytes(content.encode() if isinstance(content, str) else content)
        file = Source(path=source, filename=filename)
        return import_files(ImportRequest(files=[file], name="rows", **how), home)

    return run
