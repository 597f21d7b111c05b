"""The canary under way, between its record and the gateway."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fake_engine import FakeFrontage

from appliance import api
from appliance.canary import Limits
from appliance.store.canaries import Canaries
from appliance.store.database import open_database
from appliance.store.releases import Releases
from appliance.supervisor.trial import Trial


def test_ratings_of_answers_since_it_began_are_judged_and_outlast_the_daemon(tmp_path: Path) -> None:
    db = open_database(tmp_path / "appliance.db")
    releases = Releases(db)
    for id in ("old", "new"):
        releases.add(id, "tiny", "verified", "", {}, promote=id == "old")
    said: dict[str, Counter[api.Rating]] = {"old": Counter(good=20), "new": Counter()}
    asked: set[float] = set()

    def ratings(release: str, since: float) -> Counter[api.Rating]:
        asked.add(since)
        return said[release]

    canary = Trial(Canaries(db), releases, ratings, FakeFrontage(), Limits()).start("new", 0.1)

    trial = Trial(Canaries(db), releases, ratings, FakeFrontage(), Limits())
    view = trial.view()
    assert view is not None
    assert view.verdict.outcome == "wait"
    said["new"] = Counter(bad=8)
    view, status = trial.view(), trial.status()
    assert view is not None
    assert (view.verdict.outcome, view.verdict.reason[:12]) == ("rollback", "8 of 8 ratin")
    assert status is not None
    assert [side.ratings for side in status.figures] == [{"good": 20}, {"bad": 8}]
    assert asked == {canary.since}
    said["new"] = Counter(good=8)
    view = trial.view()
    assert view is not None
    assert view.verdict.outcome == "wait", "the newest word on an answer counts"
