from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def exact_products() -> Iterator[None]:
    """Train in fp32 on every processor: what is computed in other pieces is then the same but for a few last bits."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("appliance.train.products.are_fast", lambda: False)
        yield
