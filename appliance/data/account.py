"""What becomes of the rows of an import, and what a person should know of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from appliance.data.dataset import canonical_json
from appliance.data.formats import FORMATS, Canonical, Dropped, kind_of, shown_keys
from appliance.data.private import EMAIL
from appliance.errors import InvalidInput

SHOWN = 20
"""So many rows are named as examples of a finding."""


@dataclass
class Account:
    """What became of the rows so far. Each that is dropped is written to `drops`, a JSON object a line."""

    drops: BinaryIO
    rows_in: int = 0
    kept: int = 0
    duplicates: int = 0
    trimmed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows dropped, by code."""
    first_drop: dict[str, Any] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    evidence: dict[str, str] = field(default_factory=dict)
    """Of each format, the first row of it and the keys that show it."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Kinds of rows seen, each with the place of its first."""
    private: Counter[str] = field(default_factory=Counter)
    """Secrets and e-mail addresses found, by what they are."""
    private_rows: list[str] = field(default_factory=list)
    """Where the first of them are."""

    def drop(self, place: dict[str, Any], error: Dropped) -> None:
        found = {**place, "code": error.code, "reason": error.reason}
        self.first_drop = self.first_drop or found
        self.dropped[error.code] += 1
        self.drops.write(canonical_json(found) + b"\n")

    def recognise(self, place: dict[str, Any], value: Any, found: Canonical) -> None:
        """Note the format and the kind of a row."""
        self.formats[found.format] += 1
        self.trimmed += found.trimmed
        if found.format not in self.evidence:
            self.evidence[found.format] = f"{place_name(place)} has the keys {shown_keys(value)}"
        self.kinds.setdefault(kind_of(found.row), place_name(place))

    def check(self, files: str) -> None:
        """Raise InvalidInput where the rows make no dataset."""
        if not self.rows_in:
            raise InvalidInput("no_rows", f"{files} holds no rows", "choose a file with rows in it")
        if not self.kept:
            raise InvalidInput(
                "no_rows_kept",
                f"none of the {self.rows_in} rows of {files} can be used; the first, {place_name(self.first_drop)}: "
                f"{self.first_drop['reason']}",
                f"mend the rows, name their format (--format {'|'.join(FORMATS)}) or their columns (--map)",
            )
        if len(self.kinds) > 1:
            places = " and ".join(f"{kind} rows (first at {place})" for kind, place in self.kinds.items())
            raise InvalidInput("mixed_kinds", f"{files} holds {places}", "put each kind into a dataset of its own")

    def figures(self) -> dict[str, Any]:
        """The account as the report holds it: rows_in == kept + dropped + duplicates."""
        return {
            "format": dict(self.formats),
            "evidence": self.evidence,
            "kind": next(iter(self.kinds)),
            "rows_in": self.rows_in,
            "kept": self.kept,
            "dropped": self.dropped.total(),
            "duplicates": self.duplicates,
            "drop_codes": dict(self.dropped),
            "private": dict(self.private),
        }


def place_name(place: dict[str, Any]) -> str:
    """A place as a person finds it; with the file's name where there are several."""
    where = f"line {place['line']}" if "line" in place else f"index {place['index']}"
    return f"{where} of {place['file']}" if place.get("file") else where


def findings(report: dict[str, Any], account: Account, redacted: bool) -> list[dict[str, Any]]:
    """What a person should know of an import: errors, which block training, then warnings, then notes.

    An error that a base model's tokenizer gives holds for that `base`.
    """
    found: list[dict[str, Any]] = []

    def say(level: str, code: str, count: int, message: str, **more: Any) -> None:
        if count:
            found.append({"level": level, "code": code, "count": count, "message": message, **more})

    tokens = report.get("tokens")
    if tokens:
        base = tokens["base"]
        for code, count in tokens["refused"].items():
            row, reason = tokens["first_refused"][code]
            say("error", code, count, f"{base} cannot be trained on {count} rows; row {row}: {reason}", base=base)
        say(
            "error",
            "nothing_trained",
            int(not tokens["trained"]),
            f"no token of the dataset would be trained on {base}",
            base=base,
        )
        twice = sum(count for number, count in tokens["bos"].items() if int(number) > 1)
        say("warning", "repeated_bos", twice, f"{twice} rows begin with more than one beginning-of-sequence token")
        spelled = tokens["spelled_special"]
        say(
            "warning",
            "special_token_in_text",
            spelled,
            f"{spelled} rows spell a special token of {base} in their text, which the tokenizer takes for the token "
            f"itself; the first is row {tokens['first_spelled']}",
        )
        long, lost = tokens.get("truncated_rows", 0), tokens.get("truncated_tokens", 0)
        longest = tokens["percentiles"].get("100", 0)
        say(
            "warning",
            "too_long",
            long,
            f"{long} rows are longer than {tokens.get('max_length')} tokens, {lost} tokens in all; the longest has "
            f"{longest}: training refuses them, or leaves them out with drop_long",
        )
        share = tokens["trained_share"]
        say("warning", "little_trained", int(0 < share < 0.02), f"only {share:.1%} of the tokens are trained")
    near = report["near_duplicates"]
    say("warning", "near_duplicates", near, f"{near} rows are nearly the same as an earlier one", rows=report["near"])
    conflicts = report["conflicts"]
    what = "prompts have different answers" if report["kind"] == "messages" else "answers are judged both good and bad"
    say("warning", "conflicting_answers", conflicts, f"{conflicts} {what}", rows=report["conflicting"])
    both = report["questions_on_both_sides"]
    say(
        "warning",
        "question_on_both_sides",
        both,
        f"{both} held-out rows end with a question that a training row ends with too, after another beginning",
    )
    for kind, code, what in ((True, "emails", "e-mail addresses"), (False, "secrets", "what looks like secrets")):
        here = {name: count for name, count in account.private.items() if (name == EMAIL) is kind}
        count = sum(here.values())
        named = "" if kind else f" ({', '.join(f'{name}: {number}' for name, number in here.items())})"
        first = f"; the first at {account.private_rows[0]}" if account.private_rows else ""
        if redacted:
            say("note", code, count, f"{count} times {what}{named} were replaced{first}")
        else:
            say("warning", code, count, f"the rows hold {count} times {what}{named}{first}: --redact replaces them")
    damaged = account.dropped["damaged"]
    say("warning", "salvaged", damaged, f"{damaged} damaged stretches were left out; the drops say which")
    say(
        "note",
        "trimmed_answers",
        account.trimmed,
        f"{account.trimmed} rows had white space around an answer; it was taken off",
    )
    return found


def stream_report(report: dict[str, Any], drops: Path, into: Path) -> None:
    """Write report.json with every line of the file `drops` in it, without holding them."""
    with open(into, "wb") as file, open(drops, "rb") as lines:
        file.write(canonical_json(report)[:-1] + b',"drops":[')
        for number, line in enumerate(lines):
            file.write(b"," * (number > 0) + line.rstrip(b"\n"))
        file.write(b"]}\n")
