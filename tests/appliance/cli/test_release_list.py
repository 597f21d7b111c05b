"""What `appliance releases` says of canaries."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from appliance import api, release_verbs


def test_releases_tell_of_their_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = api.Canary(release="", live="a", share=0.1, since=0, reason="waits for more requests: 9 to it")
    ended = canary.model_copy(update={"ended": 1.0, "outcome": "rolled back", "reason": "3 of 3 requests failed"})
    found = [
        api.Release(id="a", base="tiny", state="verified", created=0, live=True),
        api.Release(id="b", base="tiny", state="verified", created=0, canary=canary),
        api.Release(id="c", base="tiny", state="verified", created=0, reason="accepted", canary=ended),
    ]
    monkeypatch.setattr(release_verbs, "ask", lambda question: found)
    _, a, b, c = CliRunner().invoke(release_verbs.releases).output.splitlines()
    assert a.split()[1] == "live"
    assert b.split()[1] == "canary"
    assert b.endswith("canary of 10%: waits for more requests: 9 to it")
    assert c.split()[1] == "verified"
    assert c.endswith("accepted; canary of 10% rolled back: 3 of 3 requests failed")
