"""kill -9 at each step of the making of a release: in the end it is the one that was never killed."""

from __future__ import annotations

import pytest
from killed_release import killed_at_each_step

from appliance.home import Home, hashes
from appliance.release.manifest import read_manifest


@pytest.mark.slow
@pytest.mark.parametrize("id", ["lora", pytest.param("qlora", marks=pytest.mark.thorough)])
def test_killed_at_every_step_of_merge_verify_and_finalise(home: Home, id: str) -> None:
    run = home.runs / id
    merged = hashes(run / "merge" / "model")
    (run / "merge" / "result.json").unlink()
    for stage, least in (("merge", 10), ("verify", 3), ("finalise", 5)):
        assert killed_at_each_step(run, stage) >= least, f"{stage} has fewer steps than there must be"
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
