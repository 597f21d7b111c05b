"""How tokenizers that are known here split texts, by llama.cpp's name of each: GGUF files have the name alone."""

from __future__ import annotations

from typing import Any

Step = tuple[str, Any]
"""Kind of a step, and its regular expression, or whether it splits by itself."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITTERS: dict[str, list[Step]] = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False)],
    "dbrx": [("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False)],
    "tekken": [("Split", _CASED % ("", "", r"\p{N}")), ("ByteLevel", False)],
    "gpt-4o": [("Split", _CASED % (_SHORT, _SHORT, r"\p{N}{1,3}")), ("ByteLevel", False)],
    "qwen2": [("Split", _WORDS % r"\p{N}"), ("ByteLevel", False)],
}


COMPOSED = {"qwen2"}
"""Those that compose characters first (NFC)."""
WHOLE_WORDS = {"llama-bpe", "tekken"}
"""Those that take a word that is a token as it is, whatever the merges make of it."""


def name_of(described: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer.json splits texts; None for what is not known here."""
    pre_tokenizer = described["pre_tokenizer"] or {}
    steps = [_step(step) for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    whole = bool(described["model"].get("ignore_merges"))
    fitting = [name for name, known in SPLITTERS.items() if known == steps]
    # All words of tekken's vocabulary come out of its merges too.
    return next((name for name in fitting if (name in WHOLE_WORDS) == whole or name == "tekken"), None)


def _step(step: dict[str, Any]) -> Step:
    kind = step.get("type", "none")
    if step.get("add_prefix_space") or step.get("invert") or step.get("behavior", "Isolated") != "Isolated":
        return "another", None
    splits = {"Split": step.get("pattern", {}).get("Regex"), "ByteLevel": step.get("use_regex", True)}
    return kind, splits.get(kind, step.get("individual_digits"))


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer that llama.cpp calls `name`, one of SPLITTERS."""
    from tokenizers import Regex, pre_tokenizers

    made: list[Any] = []
    for kind, how in SPLITTERS[name]:
        match kind:
            case "Split":
                made.append(pre_tokenizers.Split(Regex(how), "isolated"))
            case "Digits":
                made.append(pre_tokenizers.Digits(individual_digits=how))
            case "ByteLevel":
                made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how))
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
