"""SIGTERM as a request to stop: obeyed at once, or where that would lose work, at the end of the step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 75
"""Exit status of a worker that stopped because it was asked to; its stage goes on when it is started again."""

ENDING = "ending"
"""This file in a stage's directory asks to end its training at the next step and to keep what it has learnt."""


class Interrupted(Exception):
    """Asked to stop in the middle of a step or an evaluation: the state is that after the last whole step."""


class Interruption:
    """Installs itself as the handler of SIGTERM."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, the signal only sets `requested`; who is inside watches it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            raise SystemExit(INTERRUPTED)
