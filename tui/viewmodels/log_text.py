"""A log that arrives in pieces of any length, as lines."""

from __future__ import annotations

from appliance.words import log_line


class LogText:
    """Puts pieces together. A carriage return starts the line anew, as progress bars do."""

    def __init__(self) -> None:
        self._tail = ""

    def take(self, piece: str) -> tuple[list[str], str]:
        """The lines that `piece` ends, and the unfinished one after them."""
        *ended, self._tail = (self._tail + piece).split("\n")
        self._tail = self._tail[-4096:]
        return [log_line(line) for line in ended], log_line(self._tail)
