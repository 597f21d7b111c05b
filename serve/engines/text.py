"""From generated tokens to text, piece by piece: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from appliance.data.thoughts import CLOSE, OPEN

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a tokenizer that turns token ids into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class TextStream:
    """The text of one answer. Characters that span tokens are held back until they are whole."""

    def __init__(self, tokenizer: Decoder, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0
        self._shown = 0
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.found

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now that `token_ids` have come."""
        self._ids += token_ids
        text = self._unshown()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._settled, self._shown = self._shown, len(self._ids)
        return self._stop.push(text)

    def finish(self) -> str:
        """The text that was held back, now that nothing follows; without a last character that lacks bytes."""
        return self._stop.push(self._unshown().rstrip(_INCOMPLETE)) + self._stop.finish()

    def _unshown(self) -> str:
        # Decoding from a little before the new tokens keeps the spaces between them right.
        known = self._decode(self._ids[self._settled : self._shown])
        return self._decode(self._ids[self._settled :])[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


class Thoughts:
    """Tells the thought that an answer may begin with, between `<think>` and `</think>`, from what it says."""

    def __init__(self, *, begun: bool | None) -> None:
        """`begun`: whether the prompt has opened a thought already; None: the model has none, all is said."""
        self._at: Literal["start", "thought", "end", "text"] = (
            "text" if begun is None else "thought" if begun else "start"
        )
        self._held = ""
        self._quiet = True

    def push(self, text: str, *, last: bool) -> tuple[str, str]:
        """What is certain now of the thought, and of what is said; with the last of the text, all of both."""
        self._held += text
        thought = ""
        if self._at == "start":
            begin = self._held.lstrip()
            if begin.startswith(OPEN):
                self._at, self._held = "thought", begin.removeprefix(OPEN)
            elif last or not OPEN.startswith(begin):
                self._at = "text"
            else:
                return "", ""
        if self._at == "thought":
            thought, closed, rest = self._held.partition(CLOSE)
            if not closed and not last:
                rest = self._held[len(thought[: len(thought) - _begun(thought, CLOSE)].rstrip()) :]
                thought = thought[: len(thought) - len(rest)]
            else:
                thought = thought.rstrip()
            self._held = rest
            if self._quiet:
                thought = thought.lstrip()
                self._quiet = not thought
            if not closed:
                return thought, ""
            self._at = "end"
        if self._at == "end":
            self._held = self._held.lstrip()
            self._at = "text" if self._held else "end"
        said, self._held = self._held, ""
        return thought, said


class StopStrings:
    """Cuts a text at the stop string that is complete first, however the text is cut into pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if self.found or not self._stop:
            return "" if self.found else text
        self._held += text
        matches = [(start + len(string), start) for string in self._stop if (start := self._held.find(string)) >= 0]
        if matches:
            self.found = True
            _, start = min(matches)
            before, self._held = self._held[:start], ""
            return before
        keep = max(_begun(self._held, string) for string in self._stop)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` begins with."""
    longest = min(len(string) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
