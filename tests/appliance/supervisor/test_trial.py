"""The canary under way, between its record and the gateway."""

from __future__ import annotations

import time
from pathlib import Path

from fake_engine import FakeFrontage

from appliance.canary import Limits
from appliance.store.canaries import Canaries
from appliance.store.database import open_database
from appliance.store.feedback import Answer, Feedback, Remark
from appliance.store.releases import Releases
from appliance.supervisor.trial import Trial


def test_ratings_of_answers_since_it_began_are_judged_and_outlast_the_daemon(tmp_path: Path) -> None:
    db = open_database(tmp_path / "appliance.db")
    releases, feedback = Releases(db), Feedback(db)
    for id in ("old", "new"):
        releases.add(id, "tiny", "verified", "", {}, promote=id == "old")
    feedback.add(Answer(f"before-{number}", "old", "k", time.time()) for number in range(20))
    Trial(Canaries(db), releases, feedback, FakeFrontage(), Limits()).start("new", 0.1, room=True)
    for release in ("old", "new"):
        feedback.add(Answer(f"{release}-{number}", release, "k", time.time()) for number in range(20))
    for number in range(20):
        feedback.give(Remark(f"before-{number}", "bad"), "k")
        feedback.give(Remark(f"old-{number}", "good"), "k")

    trial = Trial(Canaries(db), releases, feedback, FakeFrontage(), Limits())
    view = trial.view()
    assert view is not None
    assert view.verdict.outcome == "wait"
    for number in range(8):
        feedback.give(Remark(f"new-{number}", "bad"), "k")
    view, status = trial.view(), trial.status()
    assert view is not None
    assert (view.verdict.outcome, view.verdict.reason[:12]) == ("rollback", "8 of 8 ratin")
    assert status is not None
    assert [side.ratings for side in status.figures] == [{"good": 20}, {"bad": 8}]
    for number in range(8):
        feedback.give(Remark(f"new-{number}", "good"), "k")
    view = trial.view()
    assert view is not None
    assert view.verdict.outcome == "wait", "the newest word on an answer counts"
