"""What becomes of the rows of an import, and what a person should know of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from appliance.data.dataset import canonical_json
from appliance.data.dropped import Dropped
from appliance.data.fields import MEANING, Level, level
from appliance.data.formats import FORMATS, Canonical, kind_of, shown_keys
from appliance.data.private import EMAIL
from appliance.errors import InvalidInput

_LEVELS: tuple[Level, ...] = ("error", "warning", "note")
_KEYS_NAMED = 8
"""So many keys are named in a finding; the report has all."""
_UNREAD_ADVICE = {
    "error": ". Name the format (--format), rename a column (--map NAME=COLUMN), or train without: --ignore KEY",
    "warning": ". Where they matter: --map NAME=COLUMN; where they do not: --ignore KEY",
    "note": "",
}
_ODD: dict[str, tuple[Level, str]] = {
    "no_value": ("warning", "{} rows have a text that programs write where there is nothing (nan, None, N/A)"),
    "placeholder": ("warning", "{} rows hold a placeholder such as {{{{name}}}} that nothing has filled"),
    "rendered": ("warning", "{} rows hold the control tokens of a chat template, as if they had been rendered before"),
    "written_by_python": (
        "warning",
        "{} rows have an answer that is a list or an object as Python writes it, and is trained as text",
    ),
    "thought_in_other_marks": (
        "warning",
        "{} rows have an answer that begins with a thought in marks that are trained as text",
    ),
    "media_mark": ("warning", "{} rows have the mark of an image, a video or a sound, which is trained as text"),
    "broken_characters": ("warning", "{} rows hold characters that were lost or read in a wrong encoding"),
    "tools_in_text": (
        "note",
        "{} rows have tools and calls in Hermes' marks: they were read, and the system prompt that describes the tools "
        "gives way to the chat template's own",
    ),
    "call_in_text": (
        "warning",
        "{} rows have an answer with a tool call in its text, in marks that are trained as text: among other words, "
        "quoted, or in a preference",
    ),
    "thought_is_a_flag": (
        "note",
        "{} rows say only whether there is a thought, under a key that has the thought elsewhere: it is not trained",
    ),
    "judgement_not_used": (
        "error",
        "{} rows have a judgement of an answer that is trained all the same: --format unpaired, or --ignore its key",
    ),
    "label_of_numbers": (
        "note",
        "{} rows are judged by a `label` that is a number or a word: where it is a class of theirs, --ignore label",
    ),
    "unanswered": ("warning", "{} rows end with a turn that nobody answers; it was left out"),
    "other_branches": ("note", "{} chats have other branches than the current one, which is what was read"),
    "greeting": ("note", "{} rows begin with the assistant: what it says before anybody asks is kept, and not trained"),
    "consecutive": ("note", "{} rows have turns of one speaker in a row, which are kept as they are"),
    "later_system": ("note", "{} rows have a system message between other turns, which is kept there"),
}
"""What is hardly meant, or was read in a way that a person should know."""
SHOWN = 20
"""So many rows are named as examples of a finding."""


@dataclass
class Account:
    """What became of the rows so far. Each that is dropped is written to `drops`, a JSON object a line."""

    drops: BinaryIO
    rows_in: int = 0
    kept: int = 0
    duplicates: int = 0
    thoughts: int = 0
    """Rows that were kept with a thought before an answer."""
    trimmed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows dropped, by code."""
    first_drop: dict[str, Any] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    evidence: dict[str, str] = field(default_factory=dict)
    """Of each format, the first row of it and the keys that show it."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Kinds of rows seen, each with the place of its first."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows by the keys that hold something and were not read."""
    odd: Counter[str] = field(default_factory=Counter)
    """Rows with what is hardly meant, or was read in a way to be known, by code."""
    first_unread: dict[str, str] = field(default_factory=dict)
    """Of each key that was not read, the place of the first row that has it."""
    first_odd: dict[str, str] = field(default_factory=dict)
    """Of each such code, the place of the first row."""
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
        if found.unread or found.odd:
            self.unread.update(found.unread)
            self.odd.update(found.odd)
            for name in found.unread:
                self.first_unread.setdefault(name, place_name(place))
            for name in found.odd:
                self.first_odd.setdefault(name, place_name(place))
        if found.format not in self.evidence:
            self.evidence[found.format] = f"{place_name(place)} has the keys {shown_keys(value)}"
        if (kind := kind_of(found.row)) not in self.kinds:
            self.kinds[kind] = place_name(place)

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
            fault, advice = f"{files} holds {places}", "put each kind into a dataset of its own"
            if "unpaired" in self.kinds:
                other = self.first_unread.get("label", "")
                fault += ", by their `label`" + (f", which is neither true nor false at {other}" if other else "")
                advice += "; where `label` is no judgement of the answer: --ignore label"
            raise InvalidInput("mixed_kinds", fault, advice)

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
            "thoughts": self.thoughts,
            "drop_codes": dict(self.dropped),
            "unread": dict(self.unread),
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
            message = (
                f"{base} cannot be trained on {count} rows; row {row}: {reason}. "
                "`untrainable` in the report lists them; --drop-untrainable leaves them out"
            )
            say("error", code, count, message, base=base)
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
            f"{spelled} rows spell a special token of {base} in their text; it is taken for text, in training as when "
            f"served; the first is row {tokens['first_spelled']}",
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
    for worst in _LEVELS:
        keys = [key for key, _ in account.unread.most_common() if level(key) == worst]
        more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
        named = ", ".join(_unread(account, key) for key in keys[:_KEYS_NAMED]) + more
        say(worst, "unread_keys", len(keys), f"not read: {named}{_UNREAD_ADVICE[worst]}")
    for code, (worst, what) in _ODD.items():
        first, count = account.first_odd.get(code, ""), account.odd[code]
        say(worst, code, count, f"{what.format(count)}; the first at {first}")
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


def _unread(account: Account, key: str) -> str:
    """A key, in how many rows it stands, and what it usually means."""
    meaning = MEANING.get(key.rpartition(".")[2].lower())
    usually = f", usually {meaning}" if meaning else ""
    return f"`{_shown(key)}` ({account.unread[key]} rows, first at {account.first_unread[key]}{usually})"


def _shown(key: str) -> str:
    return key.encode(errors="replace").decode()[:60]


def stream_report(report: dict[str, Any], drops: Path, into: Path) -> None:
    """Write report.json with every line of the file `drops` in it, without holding them."""
    with open(into, "wb") as file, open(drops, "rb") as lines:
        file.write(canonical_json(report)[:-1] + b',"drops":[')
        for number, line in enumerate(lines):
            file.write(b"," * (number > 0) + line.rstrip(b"\n"))
        file.write(b"]}\n")
