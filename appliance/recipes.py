"""The recipes that come with the appliance."""

from __future__ import annotations

from pathlib import Path

from appliance import api

_PACKAGE = Path(__file__).parent


def examples_directory() -> Path:
    """The shipped examples: in the package where it is installed, beside it in a checkout."""
    installed = _PACKAGE / "examples"
    return installed if installed.is_dir() else _PACKAGE.parent / "examples"


def shipped_recipes() -> list[api.ShippedRecipe]:
    """All shipped recipes by name. A recipe's summary is its first line, a comment."""
    found = []
    for path in sorted((examples_directory() / "recipes").glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        summary = text.partition("\n")[0].lstrip("# ")
        found.append(api.ShippedRecipe(name=path.stem, summary=summary, text=text))
    return found
