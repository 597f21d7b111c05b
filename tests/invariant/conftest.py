from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "appliance" / "train"))

from tiny import make_model

from appliance.home import Home


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Home:
    """A home with the model `tiny`."""
    home = Home(tmp_path / "home")
    home.create()
    os.symlink(tiny_model, home.models / "tiny")
    return home
