from __future__ import annotations

import json
from typing import Any

import pytest
from importing import Import

from appliance.data.dataset import Dataset
from appliance.data.private import find_private, private_kinds, redact
from appliance.home import Home

LETTERS = "0123456789abcdefghijABCDEFGHIJ0123456789"
SECRETS = {
    "e-mail address": "jane.doe+list@mail.example.org",
    "AWS key": "AKIA" + "ABCDEFGH01234567",
    "GitHub token": "ghp_" + LETTERS[:36],
    "GitLab token": "glpat-" + LETTERS[:20],
    "Google key": "AIza" + LETTERS[:35],
    "Hugging Face token": "hf_" + LETTERS[:34],
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----",
    "secret key": "sk-proj-" + LETTERS[:24],
    "Slack token": "xoxb-" + "123456789012-abcdef",
    "Stripe key": "sk_live_" + LETTERS[:24],
    "web token": "eyJ" + "hbGciOiJIUzI1" + ".eyJ" + "zdWIiOiIxMjM0" + ".SflKxwRJSMeKKF2",
}
HARMLESS = ["user @ home", "@someone", "a risk-free offer", "ghp_short", "AKIA", "highlight", "half_done", "eyJ", "x@y"]


def row(text: str) -> dict[str, Any]:
    return {"instruction": f"q{len(text)}", "output": f"It is {text}, he said."}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_is_found_named_and_replaced(imported: Import, home: Home, kind: str) -> None:
    report = imported([row("nothing"), row(SECRETS[kind])])
    assert report["private"] == {kind: 1}
    (finding,) = report["findings"]
    assert finding["level"] == "warning"
    assert "the first at line 2" in finding["message"]
    assert kind in finding["message"]
    redacted = imported([row("nothing"), row(SECRETS[kind])], redact=True)
    assert redacted["private"] == {kind: 1}
    assert [one["level"] for one in redacted["findings"]] == ["note"]
    assert Dataset.open(home, redacted["id"]).rows[1]["messages"][1]["content"] == f"It is [{kind}], he said."
    assert SECRETS[kind][6:12] not in (home.datasets / redacted["id"] / "rows.jsonl").read_text()
    assert imported((home.datasets / redacted["id"] / "rows.jsonl").read_bytes())["private"] == {}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc+/=", "private key"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nMIIEpAIBAAKCAQEA\n-----END PGP PRIVATE KEY BLOCK-----", "private key"),
        ("MY_AKIAABCDEFGH01234567", "AWS key"),
        ("my_" + SECRETS["GitHub token"], "GitHub token"),
    ],
)
def test_keys_that_are_cut_off_or_named_are_taken_out_whole(text: str, kind: str) -> None:
    assert find_private({"messages": [{"content": text}]}, private_kinds(text.encode())) == {kind: 1}
    left = redact(text, [kind])
    assert "MIIE" not in left
    assert "ABCDEFGH" not in left
    assert LETTERS[:20] not in left


def test_harmless_texts_are_left_alone(imported: Import, home: Home) -> None:
    report = imported([row(text) for text in HARMLESS], redact=True)
    assert report["private"] == {}
    assert report["id"] == imported([row(text) for text in HARMLESS])["id"]


def test_what_is_said_to_and_by_tools_is_looked_at(imported: Import, home: Home) -> None:
    call = {"name": "mail", "arguments": {"to": ["a@example.com"], "copies": 2}}
    messages = [
        {"role": "user", "content": "mail b@example.com"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sent to c@example.com"},
        {"role": "assistant", "content": "Done."},
    ]
    report = imported([{"messages": messages}], redact=True)
    assert report["private"] == {"e-mail address": 3}
    assert "example.com" not in json.dumps(Dataset.open(home, report["id"]).rows[0])
    assert Dataset.open(home, report["id"]).rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "to": ["[e-mail address]"],
        "copies": 2,
    }
