"""What the verbs about releases print of canaries and of damage."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from appliance import api
from appliance.cli import box, releases
from appliance.cli.main import main
from appliance.errors import InvalidInput


def test_releases_tell_of_their_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = api.Canary(release="", live="a", share=0.1, since=0, reason="waits for more requests: 9 to it")
    ended = canary.model_copy(update={"ended": 1.0, "outcome": "rolled back", "reason": "3 of 3 requests failed"})
    found = [
        api.Release(id="a", base="tiny", state="verified", created=0, live=True),
        api.Release(id="b", base="tiny", state="verified", created=0, canary=canary),
        api.Release(id="c", base="tiny", state="verified", created=0, reason="accepted", canary=ended),
    ]
    monkeypatch.setattr(releases, "ask", lambda question: found)
    _, a, b, c = CliRunner().invoke(releases.releases).output.splitlines()
    assert a.split()[1] == "live"
    assert b.split()[1] == "canary"
    assert b.endswith("canary of 10%: waits for more requests: 9 to it")
    assert c.split()[1] == "verified"
    assert c.endswith("accepted; canary of 10% rolled back: 3 of 3 requests failed")


def test_releases_tell_of_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = api.Release(id="a", base="tiny", state="verified", created=0, reason="all passed", damage="x is missing")
    monkeypatch.setattr(releases, "ask", lambda question: [damaged])
    _, a = CliRunner().invoke(releases.releases).output.splitlines()
    assert a.split()[1] == "damaged"
    assert a.endswith("x is missing; all passed")


def test_a_release_is_shown_as_it_is_now_before_what_its_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = api.Release(id="a", base="tiny", state="refused", created=0, reason="repeated here, structure: no")
    other = now.model_copy(update={"id": "b"})
    answers = iter([[other, now], {"release": "a", "state": "verified", "reason": "all 5 gates passed"}])
    monkeypatch.setattr(releases, "ask", lambda question: next(answers))
    shown = json.loads(CliRunner().invoke(releases.releases, ["a"]).stdout)
    assert next(iter(shown)) == "now"
    assert (shown["now"]["state"], shown["now"]["reason"]) == ("refused", "repeated here, structure: no")
    assert shown["state"] == "verified"


def test_releases_from_elsewhere_say_so_when_they_are_live_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        api.Release(id=id, base="tiny", state="verified elsewhere", created=0, live=id == "a", note="10 of 10 repeated")
        for id in ("a", "b")
    ]
    monkeypatch.setattr(releases, "ask", lambda question: found)
    _, a, b = CliRunner().invoke(releases.releases).output.splitlines()
    assert "  live, verified elsewhere  " in a
    assert "  verified elsewhere  " in b
    assert b.endswith("10 of 10 repeated")


def check(state: str, **fields: object) -> api.Check:
    return api.Check.model_validate({"release": "a", "state": state, **fields})


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (check("whole"), "a is whole: its files are those that its manifest lists"),
        (check("damaged", damage="x is missing"), "release a is damaged: x is missing — restore its files"),
    ],
)
def test_verify_says_how_far_it_is_and_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: api.Check, said: str
) -> None:
    states = [check("reading"), check("reading", read=8 * 10**9, bytes=16 * 10**9), last]
    monkeypatch.setattr(releases, "each", lambda stream, show: [show(state) for state in states])
    monkeypatch.setattr(releases, "_PROGRESS_SECONDS", -1)
    monkeypatch.setattr("appliance.cli.main.sys.argv", ["appliance", "verify", "a"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert printed.err.splitlines()[:2] == [
        "the files of a are being read",
        "the files of a are being read: 8.0 GB of 16.0 GB",
    ]
    assert said in (printed.err if last.damage else printed.out)
    assert ended.value.code == (1 if last.damage else 0)


@pytest.mark.parametrize(
    ("state", "said"),
    [("verified elsewhere", "`appliance verify a --gates` repeats them here"), ("verified", "it was here already, v")],
)
def test_an_imported_release_says_what_it_is_worth(
    monkeypatch: pytest.MonkeyPatch, state: api.ReleaseState, said: str
) -> None:
    monkeypatch.setattr(releases, "ask", lambda _: api.Release(id="a", base="tiny", state=state, created=0))
    printed = CliRunner().invoke(releases.import_release, ["a.tar"])
    assert printed.stdout == "a\n"
    assert said in printed.stderr


@pytest.mark.parametrize(
    ("routed", "said"), [("a", "a"), ("b", "a (b answers meanwhile)"), (None, "a (nothing answers yet)")]
)
def test_status_says_who_answers(monkeypatch: pytest.MonkeyPatch, routed: str | None, said: str) -> None:
    nothing = api.Hardware.model_construct()
    now = api.Status.model_construct(
        endpoint="", live="a", routed=routed, engines=(), lease="share", queued=0, running=None, hardware=nothing
    )
    monkeypatch.setattr(box, "ask", lambda _: now)
    assert f"live      {said}" in CliRunner().invoke(box.status).stdout.splitlines()


def test_a_promotion_whose_files_are_still_read_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = check("reading", read=1 * 10**9, bytes=16 * 10**9)
    release = api.Release(id="a", base="tiny", state="verified", created=0, live=True, check=reading)
    monkeypatch.setattr(releases, "ask", lambda question: release)
    result = CliRunner().invoke(releases.promote, ["a"])
    assert result.stdout == "a\n"
    assert "1.0 GB of 16.0 GB; it answers when they are whole" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "as_gguf"),
    [(["m.gguf"], True), (["deep/m.gguf", "--quantise", "Q8_0"], True), (["x", "--gguf"], True), (["x"], False)],
)
def test_an_export_goes_by_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], as_gguf: bool
) -> None:
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(releases, "ask", lambda question: None)
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(releases.subprocess, "run", lambda command, **_: commands.append(command) or done)
    result = CliRunner().invoke(releases.export, ["r-1", *arguments])
    assert (result.exit_code, result.output.strip()) == (0, arguments[0])
    assert [command[2] for command in commands] == (["appliance.release.gguf_file"] if as_gguf else [])
    assert all(command[5:] == arguments[2:] for command in commands)


def test_an_export_is_not_two_kinds_of_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a tar and a GGUF file"):
        CliRunner().invoke(releases.export, ["r-1", str(tmp_path / "r.tar"), "--gguf"], catch_exceptions=False)
