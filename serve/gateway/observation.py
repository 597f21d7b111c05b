"""What an answer shows while it passes through: its times, how it ended, and whether it reports a failure."""

from __future__ import annotations

import re
import time

from appliance.canary import FIRST_TOKEN, LATER_TOKEN, WHOLE_ANSWER

# Within a JSON string every quotation mark has a backslash before it, so that no text of an answer matches these.
_STOP = re.compile(rb'"finish_reason":\s*"(\w+)"')
_TEXT = re.compile(rb'"content":\s*"[^"]')
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_FAILURE = re.compile(rb'^data:\s*\{"error"', re.MULTILINE)


class Observation:
    """Watches one answer, which is asked for now."""

    def __init__(self) -> None:
        self.complete = False
        """Whether the last of it has come."""
        self.failed = False
        """Whether the engine has reported a failure in the middle of a stream."""
        self.stops: list[str] = []
        """Why each choice ended."""
        self.seconds: dict[str, float] = {}
        """Times by the names of `appliance.canary.TIMINGS`."""
        self._asked = time.perf_counter()
        self._pieces = 0
        self._first_piece = 0.0

    def events(self, frames: bytes, complete: bool) -> None:
        """Whole events of a stream have come; with them it may be `complete`. An event with text counts as a token."""
        now = time.perf_counter()
        self.complete = complete
        self.seconds.setdefault(FIRST_TOKEN, now - self._asked)
        self.failed |= bool(_FAILURE.search(frames))
        self._end(frames)
        if pieces := len(_TEXT.findall(frames)):
            self._first_piece = self._first_piece or now
            self._pieces += pieces
            if self._pieces > 1:
                self.seconds[LATER_TOKEN] = (now - self._first_piece) / (self._pieces - 1)

    def document(self, body: bytes) -> None:
        """The whole answer has come."""
        seconds = time.perf_counter() - self._asked
        self.complete = True
        self._end(body)
        tokens = _TOKENS.search(body)
        if tokens and int(tokens[1]):
            self.seconds[WHOLE_ANSWER] = seconds / int(tokens[1])

    def _end(self, part: bytes) -> None:
        self.stops += [reason.decode() for reason in _STOP.findall(part)]
