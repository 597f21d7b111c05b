"""Models that the daemon pulls: started, shown, followed, stopped, and never twice at once."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import pytest
from controlling import Control

from appliance import api
from appliance.errors import InvalidInput, NotFound
from appliance.words import pull_line

PULLER = """
import os, pathlib, sys, time
arguments, (name, root) = sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]
root = pathlib.Path(root)
assert "HF_HUB_OFFLINE" not in os.environ
with open(root / "started", "a") as started:
    started.write(" ".join(arguments[2:]) + "\\n")
place = root / "models" / ".pulling" / "p" / "model"
place.mkdir(parents=True)
(place.parent / "expected").write_text("4000")
(place / "weights.part").write_bytes(bytes(1000))
print("asking the Hub for", name, file=sys.stderr, flush=True)
while not (root / "go").exists():
    time.sleep(0.02)
print("model is ready", file=sys.stderr, flush=True)
"""


@pytest.fixture
def puller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a download a process that has a quarter, and waits."""
    (tmp_path / "puller.py").write_text(PULLER)
    monkeypatch.setattr("serve.control.models._COMMAND", (sys.executable, str(tmp_path / "puller.py")))
    monkeypatch.setattr("appliance.client._CHECK_SECONDS", 0.02)


async def half_way(control: Control) -> api.Pull:
    async with asyncio.timeout(30):
        async for now in control.client.pull("org/Model", serve_only=True):
            if now.bytes:
                return now
    raise AssertionError


async def test_a_pull_is_followed_by_its_bytes_to_its_end(control: Control, puller: None) -> None:
    now = await half_way(control)
    assert (now.name, now.state, now.bytes, now.total) == ("model", "pulling", 1000, 4000)
    assert pull_line(now) == "model: 1.0 kB of 4.0 kB here"
    assert [pull.state for pull in await control.client.pulls()] == ["pulling"]
    (control.home.root / "go").touch()
    async with asyncio.timeout(30):
        seen = [now async for now in control.client.pull("org/Model")]
    assert (seen[-1].state, seen[-1].said) == ("done", "model is ready")
    for folder in control.home.incoming.iterdir():
        shutil.rmtree(folder)
    assert [pull.state for pull in await control.client.pulls()] == ["done"]
    assert (control.home.root / "started").read_text() == "--serve-only\n", "one process for all who ask"


async def test_a_pull_can_be_stopped_and_begun_again(control: Control, puller: None) -> None:
    await half_way(control)
    stopped = await control.client.stop_pull("model")
    assert stopped.state == "failed"
    assert stopped.problem
    assert "was stopped, or broke off" in stopped.problem.message
    (control.home.models / ".pulling" / "p" / "model" / "weights.part").unlink()
    (control.home.models / ".pulling" / "p" / "model").rmdir()
    assert (await half_way(control)).state == "pulling"
    await control.pulls.close()
    assert [pull.state for pull in await control.client.pulls()] == ["failed"]


async def test_what_cannot_be_pulled_is_said_in_its_own_words(control: Control, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be called"):
        async for _ in control.client.pull("org/..."):
            pass
    with pytest.raises(NotFound, match="is not being pulled"):
        await control.client.stop_pull("nope")
    async with asyncio.timeout(60):
        *_, unknown = [now async for now in control.client.pull("nope")]
        *_, unread = [now async for now in control.client.pull("mine", str(tmp_path / "not-there"))]
    assert unknown.problem
    assert (unknown.problem.code, "a Hub id like ORG/REPO" in unknown.problem.next) == ("no_such_model", True)
    assert unread.problem
    assert "may not be read by the user that pulls" in unread.problem.message
