"""The pages say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from appliance.cli.main import cli
from appliance.errors import Exit
from appliance.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_is_in_the_readme(name: str) -> None:
    assert f"`APPLIANCE_{name.upper()}`" in README


def test_every_variable_in_the_readme_is_a_setting() -> None:
    declared = {f"APPLIANCE_{field.name.upper()}" for field in fields(Settings)}
    assert set(re.findall(r"APPLIANCE_[A-Z_]+", README)) <= declared


def test_every_verb_in_the_readme_exists() -> None:
    verbs = set(re.findall(r"^\$ (?:\.venv/bin/)?appliance ([a-z-]+)", README, re.MULTILINE))
    assert verbs
    assert verbs <= set(cli.commands)


def test_exit_codes_in_the_readme() -> None:
    line = next(line for line in README.splitlines() if "Exit codes:" in line)
    assert [int(code) for code in re.findall(r"\b(\d) ", line)] == [int(code) for code in Exit]


PAGES = ("README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md", "docs/DATA.md", "docs/RECIPES.md", "docs/TEMPLATES.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_every_path_on_the_architecture_map_exists() -> None:
    block = (ROOT / "docs/ARCHITECTURE.md").read_text().split("## The map")[1].split("Imports run")[0]
    missing, folder = [], ""
    for line in block.splitlines():
        match = re.match(r"^    (  )?(\S+?)(/?)(?:,|\s|$)", line)
        if not match:
            continue
        names = re.findall(r"[a-z_]+\.py|[a-z]+/", line.split("  ")[2 if not match[1] else 3])
        if not match[1]:
            folder = match[2].rstrip("/")
            continue
        missing += [f"{folder}/{name}" for name in names if not (ROOT / folder / name).exists()]
    assert missing == []
