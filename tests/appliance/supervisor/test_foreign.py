"""Releases that were verified on another box: what they have to repeat before they answer here."""

from __future__ import annotations

import json
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from mortal_daemon import Daemon

from appliance.api import Precision
from appliance.errors import Conflict
from appliance.home import hashes, sha256
from appliance.supervisor.engines import ProbeAnswer
from appliance.supervisor.references import first_difference

MADE = 1e9
PROMPTS = tuple(f"question {number}" for number in range(10))


def arrive(daemon: Daemon, id: str, engine: str = "fake", prompts: tuple[str, ...] = PROMPTS) -> str:
    """A release as an import leaves it; on the other box it has said hello to every prompt, on that day."""
    folder = daemon.home.releases / id
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights from elsewhere")
    said = f"hello on {date.fromtimestamp(MADE)}, and to all of you"
    answers = [{"messages": [{"role": "user", "content": prompt}], "text": said} for prompt in prompts]
    parts = ("datasets", "dataset_rows", "merge", "stages", "base_files", "recipe", "versions", "gates")
    manifest: dict[str, Any] = {part: {} for part in parts} | {"files": hashes(folder), "release": id, "base": "tiny"}
    manifest |= {"state": "verified", "reason": "", "created": MADE, "recipe_sha256": ""}
    manifest |= {"reference": {"engine": engine, "answers": answers} if engine else {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    digest = sha256(folder / "manifest.json")
    daemon.supervisor.releases.add(id, "tiny", "verified elsewhere", "", {}, promote=False, manifest_sha256=digest)
    return id


async def test_it_repeats_what_it_said_elsewhere_before_it_answers(daemon: Daemon) -> None:
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    imported = arrive(daemon, "imported")
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.routed == imported)
    assert daemon.engine.probed.count(imported) == 10
    release = daemon.supervisor.releases.get(imported)
    assert (release.state, release.note) == (
        "verified elsewhere",
        "10 of 10 reference answers were repeated here",
    )
    daemon.engine.probed.clear()
    await daemon.die()
    daemon.start()
    await daemon.until(lambda: daemon.frontage.routes[-1] == imported)
    assert daemon.engine.probed == [], "once is enough"


@pytest.mark.parametrize("forgotten", [2, 3])
async def test_one_in_five_may_begin_otherwise(daemon: Daemon, forgotten: int) -> None:
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    imported = arrive(daemon, "imported")
    daemon.engine.forgetful = {imported: set(PROMPTS[:forgotten])}
    routes = len(daemon.frontage.routes)
    daemon.supervisor.promote(imported)
    if forgotten == 2:
        await daemon.until(lambda: daemon.supervisor.routed == imported)
        return
    await daemon.until(lambda: daemon.supervisor.releases.setback())
    assert daemon.supervisor.releases.live() == own
    assert daemon.frontage.routes[routes:] == [], "it has answered nobody"
    release = daemon.supervisor.releases.get(imported)
    assert release.state == "refused"
    assert release.reason.startswith("only 7 of 10 reference answers were repeated here: it answers 'what?'")
    assert f"{imported} did not go live: it was refused: only 7 of 10" in daemon.supervisor.releases.setback()
    with pytest.raises(Conflict, match="was refused"):
        daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.running("engine") == [own])


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("vllm", "its reference answers are those of another engine (vllm), so none was repeated here"),
        ("", "its reference answers are not in its archive, so none was repeated here"),
    ],
)
async def test_where_it_cannot_repeat_them_that_is_said(daemon: Daemon, engine: str, said: str) -> None:
    imported = arrive(daemon, "imported", engine)
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.routed == imported)
    assert daemon.supervisor.releases.get(imported).note == said
    assert daemon.engine.probed == []


@pytest.mark.parametrize(("there", "here"), [("FP8", "16-bit"), ("16-bit", "FP8"), (None, "FP8")])
async def test_answers_in_another_precision_are_those_of_another_engine(
    daemon: Daemon, there: Precision | None, here: Precision
) -> None:
    imported = arrive(daemon, "imported")
    path = daemon.home.releases / imported / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["reference"] |= {"precision": there} if there else {}
    path.write_text(json.dumps(manifest))
    daemon.db.execute("UPDATE releases SET manifest_sha256 = '' WHERE id = ?", (imported,))
    daemon.engine.precision = here
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.routed == imported)
    kind = "fake in FP8" if there == "FP8" else "fake"
    said = f"its reference answers are those of another engine ({kind}), so none was repeated here"
    assert daemon.supervisor.releases.get(imported).note == said
    assert daemon.engine.probed == []


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([7], "its reference answers could not be asked for here: TypeError"),
        ([{"messages": [{"role": "user", "content": "too long"}], "text": "hm"}], "only 0 of 1 reference answers were"),
    ],
)
async def test_a_release_that_cannot_be_asked_for_its_reference_answers_is_refused(
    daemon: Daemon, answers: list[Any], why: str
) -> None:
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    imported = arrive(daemon, "imported")
    path = daemon.home.releases / imported / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"reference": {"engine": "fake", "answers": answers}}))
    daemon.db.execute("UPDATE releases SET manifest_sha256 = '' WHERE id = ?", (imported,))
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.releases.get(imported).state == "refused")
    await daemon.until(lambda: daemon.supervisor.releases.live() == own)
    assert why in daemon.supervisor.releases.get(imported).reason
    assert imported not in daemon.frontage.routes


async def test_an_engine_that_goes_away_meanwhile_is_asked_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.supervisor.decide.REPLAY_REST_SECONDS", 0.01)
    imported = arrive(daemon, "imported")
    daemon.engine.unreachable = 2
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.routed == imported)
    assert daemon.supervisor.releases.get(imported).note == "10 of 10 reference answers were repeated here"


async def test_an_engine_that_never_answers_when_asked_has_failed(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.supervisor.decide.REPLAY_REST_SECONDS", 0.01)
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    imported = arrive(daemon, "imported")
    daemon.engine.unreachable = 1000
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.releases.setback())
    assert daemon.supervisor.releases.live() == own
    assert "its engine does not start" in daemon.supervisor.releases.setback()
    assert imported not in daemon.frontage.routes


async def test_a_release_on_which_no_engine_can_be_started_stops_nothing_else(daemon: Daemon) -> None:
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    imported = arrive(daemon, "imported")
    path = daemon.home.releases / imported / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"recipe": {"clock": "tomorrow"}}))
    daemon.db.execute("UPDATE releases SET manifest_sha256 = ''")
    daemon.supervisor.promote(imported)
    await daemon.until(lambda: daemon.supervisor.releases.setback())
    assert daemon.supervisor.releases.live() == own
    assert imported not in daemon.frontage.routes


async def test_as_a_canary_it_repeats_them_too(daemon: Daemon) -> None:
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    imported = arrive(daemon, "imported")
    daemon.engine.forgetful = {imported: set(PROMPTS)}
    daemon.supervisor.start_canary(imported, 0.1)
    await daemon.until(lambda: imported in daemon.supervisor.trial.newest())
    await daemon.until(lambda: daemon.supervisor.trial.newest()[imported].ended)
    assert daemon.frontage.canaries == [], "nobody was sent to it"
    assert "it was refused: only 0 of 10" in daemon.supervisor.trial.newest()[imported].reason


async def test_it_takes_nobodys_place_by_itself(daemon: Daemon) -> None:
    """A live release that is damaged gives way to one of our own, not to one that was never live here."""
    own = daemon.queue()
    await daemon.until(lambda: daemon.supervisor.routed == own)
    arrive(daemon, "imported")
    (daemon.home.releases / own / "model.safetensors").write_bytes(b"spoilt")
    await daemon.until(lambda: daemon.supervisor.releases.setback())
    assert daemon.supervisor.releases.live() is None


@pytest.mark.parametrize(
    ("recorded", "says", "repeats"),
    [
        ("I add. Four.", "I add.", True),
        ("<think>\nI add.\n</think>\n\nFour.", "\nI add.\nFo", True),
        ("<think>\n\n</think>\n\nFour.", "Four", True),
        ("I add. Four.", "I sub", False),
        ("I add. Four.", "", False),
        ("", "Four", False),
    ],
)
async def test_a_reference_begins_with_what_was_thought(recorded: str, says: str, repeats: bool) -> None:
    """As earlier versions have recorded it too, with the marks of the thought."""

    async def probe(*_: Any) -> ProbeAnswer:
        return ProbeAnswer([], says, "length", 16)

    kind: Any = SimpleNamespace(probe=probe)
    found = await first_difference(kind, "", "r", [{"messages": [], "text": recorded}])
    assert (found == "") is repeats
