"""kill -9 at each step of the making of a release: in the end it is the one that was never killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.home import Home, hashes
from appliance.release.manifest import read_manifest

SCRIPT = Path(__file__).parent / "killed_release.py"


@pytest.mark.slow
@pytest.mark.parametrize("id", ["lora", "qlora"])
def test_killed_at_every_step_of_merge_verify_and_finalise(home: Home, id: str) -> None:
    run = home.runs / id
    merged = hashes(run / "merge" / "model")
    (run / "merge" / "result.json").unlink()
    for stage, least in (("merge", 10), ("verify", 3), ("finalise", 5)):
        argv = [sys.executable, str(SCRIPT), str(run), stage]
        walk = subprocess.run(
            argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert walk.returncode == 0, walk.stderr[-3000:]
        assert int(walk.stdout.split()[-1]) >= least, f"{stage} has fewer steps than there must be"
        if stage == "merge":
            assert hashes(run / "merge" / "model") == merged
            left = {path.name for path in (run / "merge").iterdir() if not path.match(".result.json.*.tmp")}
            assert left == {"model", "result.json"}
    manifest = read_manifest(home, id)
    found = hashes(home.releases / id)
    del found["manifest.json"]
    assert manifest["state"] == "verified", manifest["reason"]
    assert manifest["files"] == found
    assert [path.name for path in home.releases.iterdir()] == [id]
