"""Secrets and e-mail addresses in texts: finding them, and putting a placeholder in their place."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from appliance.data.dataset import Row

_WORD = r"[0-9A-Za-z_-]"
_KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    # What it is: marks without which it is not there, which are quick to look for, and its form.
    "e-mail address": (("@",), r"[0-9A-Za-z][\w.%+-]*@(?:[0-9A-Za-z-]+\.)+[A-Za-z]{2,}\b"),
    "AWS key": (("AKIA", "ASIA"), r"(?<![0-9A-Za-z])(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub token": (
        ("ghp_", "gho_", "ghr_", "ghs_", "ghu_", "github_pat_"),
        r"(?<![0-9A-Za-z])(?:gh[oprsu]_[0-9A-Za-z]{36}|github_pat_\w{22,})",
    ),
    "GitLab token": (("glpat-",), rf"(?<![0-9A-Za-z])glpat-{_WORD}{{20,}}"),
    "Google key": (("AIza",), rf"(?<![0-9A-Za-z])AIza{_WORD}{{35}}"),
    "Hugging Face token": (("hf_",), r"(?<![0-9A-Za-z])hf_[0-9A-Za-z]{30,}"),
    "private key": (
        ("PRIVATE KEY",),
        r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|[0-9A-Za-z+/=\s]*)",
    ),
    "secret key": (("sk-",), rf"(?<![0-9A-Za-z])sk-{_WORD}{{20,}}"),
    "Slack token": (("xox",), r"(?<![0-9A-Za-z])xox[abeoprs]-[0-9A-Za-z-]{10,}"),
    "Stripe key": (("k_live_", "k_test_"), r"(?<![0-9A-Za-z])[prs]k_(?:live|test)_[0-9A-Za-z]{16,}"),
    "web token": (("eyJ",), rf"(?<![0-9A-Za-z])eyJ{_WORD}{{8,}}\.eyJ{_WORD}{{8,}}\.{_WORD}+"),
}
_FORMS = {kind: re.compile(form) for kind, (_, form) in _KINDS.items()}
_MARKS = [(mark.encode(), kind) for kind, (marks, _) in _KINDS.items() for mark in marks if not mark.endswith("_")]
_MARKS_WITH_END = [(mark.encode(), kind) for kind, (marks, _) in _KINDS.items() for mark in marks if mark.endswith("_")]
_BEFORE_END = tuple({mark[:-1].rpartition(b"_")[2] for mark, _ in _MARKS_WITH_END})
"""What stands before the underscore with which a mark ends: to look there is quicker than to look for the marks."""
EMAIL = "e-mail address"


def private_kinds(canonical: bytes) -> list[str]:
    """What of the kinds a row's canonical JSON may hold; `find_private` tells."""
    found = [kind for mark, kind in _MARKS if mark in canonical]
    if any([piece.endswith(_BEFORE_END) for piece in canonical.split(b"_")]):
        found += [kind for mark, kind in _MARKS_WITH_END if mark in canonical]
    return found


def find_private(row: Row, kinds: list[str]) -> Counter[str]:
    """How many of each of `kinds` the texts of a row hold."""
    found: Counter[str] = Counter()
    for text in _texts(row):
        for kind in kinds:
            if count := sum(1 for _ in _FORMS[kind].finditer(text)):
                found[kind] += count
    return found


def redact(value: Any, kinds: list[str]) -> Any:
    """A row, or part of one, with `[kind]` in the place of each of `kinds` in its texts."""
    match value:
        case str():
            for kind in kinds:
                value = _FORMS[kind].sub(f"[{kind}]", value)
            return value
        case list():
            return [redact(item, kinds) for item in value]
        case dict():
            return {key: redact(item, kinds) for key, item in value.items()}
    return value


def _texts(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case list():
            return [text for item in value for text in _texts(item)]
        case dict():
            return [text for item in value.values() for text in _texts(item)]
    return []
