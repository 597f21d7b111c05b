"""Thoughts that stand in the text of an answer, in the marks of the program that wrote it."""

from __future__ import annotations

import html
import re

OPEN, CLOSE = "<think>", "</think>"
THOUGHT = re.compile(rf"\s*{OPEN}(.*?){CLOSE}(.*)", re.DOTALL)
"""A thought before the text of an answer."""
_FOLDED = re.compile(r'\s*<details type="reasoning"[^>]*>(?:\s*<summary>.*?</summary>)?(.*?)</details>', re.DOTALL)
"""As Open WebUI writes it, quoted line by line."""
_QUOTED = re.compile(r"^> ?")
_OTHER_MARKS = re.compile(r"\s*(<thinking>|<thought>|<reasoning>|\[THINK\]|<\|begin_of_thought\|>|<details type=)")


_CLOSES_A_LINE = re.compile(rf"{CLOSE}[ \t]*(?:\n|\Z)|\n[ \t]*{CLOSE}")
"""How the mark ends a thought, and not stands in a sentence about it."""


class CutThought(Exception):
    """An answer that ends within its thought."""


def marked(text: str) -> str:
    """An answer whose thought, if it has one, stands between `<think>` and `</think>`.

    Some programs leave the first mark out, because the prompt has it. Raises CutThought.
    """
    if folded := _FOLDED.match(text):
        lines = (_QUOTED.sub("", line) for line in html.unescape(folded[1]).strip().splitlines())
        return f"{OPEN}\n" + "\n".join(lines) + f"\n{CLOSE}\n\n{text[folded.end() :].lstrip()}"
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if closed and not opened and _CLOSES_A_LINE.search(text):
        return f"{OPEN}\n{text.lstrip()}"
    if opened and not closed and text.lstrip().startswith(OPEN):
        raise CutThought
    return text


def other_marks(text: str) -> bool:
    """Whether an answer begins with the mark of a thought that chat templates take for text."""
    return bool(_OTHER_MARKS.match(text)) or '<details type="' in text
