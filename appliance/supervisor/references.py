"""Asking an engine for the answers that a release gave when it was verified, as its manifest has them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.errors import ApplianceError
from appliance.supervisor.engines import EngineKind, Probe

PROMPTS = 3
TOKENS = 16
"""How much of its recorded answers a release has to repeat after its weights were loaded in place."""
MOST_REPLAYED = 10
DIFFERING_SHARE = 5
"""Of the reference answers of a release from elsewhere one in so many may begin otherwise here, and one always may: on
other hardware sums are rounded otherwise, and where two tokens are nearly as likely, the other one is said."""
_BETWEEN = re.compile(r"</?think>|\s+")
"""What one version of an engine has between a thought and a text, and another leaves out."""


def speaker(reference: Mapping[str, Any]) -> str:
    """Which kind of engine has said reference answers; empty where nothing says so.

    Those in FP8 are another kind's: another word is now and then the likeliest.
    """
    kind = str(reference.get("engine") or "")
    return f"{kind} in FP8" if reference.get("precision") == "FP8" else kind


def reference_answers(manifest: Mapping[str, Any], here: str) -> list[dict[str, Any]]:
    """What the speaker `here` answered when the release was verified; none where it was another one, or none was."""
    reference = manifest.get("reference", {})
    return list(reference.get("answers", ())) if speaker(reference) == here else []


async def first_difference(kind: EngineKind, address: str, name: str, answers: Sequence[dict[str, Any]]) -> str:
    """How model `name` answers otherwise than in the first few of `answers`; empty: it does not.

    Raises ConnectionError where the engine does not answer, and ApplianceError where it refuses.
    """
    for asked in answers[:PROMPTS]:
        if said := await _says_otherwise(kind, address, name, asked):
            return said
    return ""


async def repeat(kind: EngineKind, address: str, name: str, answers: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """How many of `answers` model `name` repeats, in words, and what is wrong with that; empty: they are enough.

    Raises ConnectionError where the engine does not answer.
    """
    answers = answers[:MOST_REPLAYED]
    differing = [said for asked in answers if (said := await _does_not_repeat(kind, address, name, asked))]
    count = f"{len(answers) - len(differing)} of {len(answers)} reference answers were repeated here"
    if len(differing) > max(1, len(answers) // DIFFERING_SHARE) or len(differing) == len(answers):
        return count, f"only {count}: {differing[0]}"
    return count, ""


async def _says_otherwise(kind: EngineKind, address: str, name: str, asked: dict[str, Any]) -> str:
    """How an engine's answer begins otherwise than it did when its release was verified; empty: it does not."""
    answer = await kind.probe(address, name, Probe(asked["messages"], [], TOKENS))
    said, expected = (_BETWEEN.sub("", text) for text in (answer.text.rstrip("\ufffd"), asked["text"]))
    if expected.startswith(said) and bool(said) == bool(expected):
        return ""
    return f"it answers {answer.text!r}, and answered {asked['text']!r} when it was verified"


async def _does_not_repeat(kind: EngineKind, address: str, name: str, asked: dict[str, Any]) -> str:
    """The same of an engine that may refuse to be asked: then it has repeated nothing."""
    try:
        return await _says_otherwise(kind, address, name, asked)
    except ApplianceError as error:
        return f"it cannot be asked for {asked['text']!r:.80}: {error.message}"
