from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "train"))
sys.path.append(str(Path(__file__).parents[2] / "serve"))

from tiny import add_run, make_model, read_recipe, stage, work

from appliance.home import Home

STAGES = {
    "lora": stage("sft", "FACTS", epochs=30),
    "qlora": stage("sft", "FACTS", epochs=30),
    "dpo": stage("dpo", "PREFERENCES", epochs=10),
    "base": "",
}
NUDGED = {
    "nudged": stage("sft", "FACTS", max_steps=20, learning_rate=1e-3)
    + stage("dpo", "PREFERENCES", max_steps=8, learning_rate=5e-4),
    "nudged-dpo": stage("dpo", "PREFERENCES", max_steps=16, learning_rate=2e-4, epochs=20),
    "nudged-kto": stage("kto", "JUDGEMENTS", max_steps=16, learning_rate=2e-4, epochs=20),
}
"""Runs over `tiny16`, whose every update is a fraction of a step between two neighbours of its type."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with the models `tiny` and `tiny16`, and one run of each of STAGES and NUDGED, trained and merged."""
    home = Home(tmp_path_factory.mktemp("trained") / "home")
    home.create()
    base = make_model(home.models / "tiny")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "top_k": 5}))
    for id, text in STAGES.items():
        run = add_run(home, id, text, "qlora" if id == "qlora" else "lora")
        assert work(run, *read_recipe(run).pipeline()[:-2]) == 0
    make_model(home.models / "tiny16", dtype=torch.bfloat16)
    for id, text in NUDGED.items():
        run = add_run(home, id, text, base="tiny16")
        assert work(run, *read_recipe(run).pipeline()[:-2]) == 0
    return home


@pytest.fixture
def home(trained: Home, tmp_path: Path) -> Home:
    """A copy of `trained` that a test may spoil."""
    shutil.copytree(trained.root, tmp_path / "home")
    return Home(tmp_path / "home")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPLIANCE_LIVE_RELEASE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def exact_products() -> Iterator[None]:
    """Train in fp32 on every processor: what is computed in other pieces is then the same but for a few last bits."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("appliance.train.products.are_fast", lambda: False)
        yield
