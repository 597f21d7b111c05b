"""The link to the daemon: whether it stands, and how long to wait before trying again."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from appliance.errors import ApplianceError

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0


@dataclass(frozen=True)
class Link:
    """`failures` in a row and the last one's error. None of either before the first answer: connecting."""

    connected: bool = False
    failures: int = 0
    problem: str = ""

    def lost(self, error: Exception) -> Link:
        """The link after one more failure."""
        return Link(False, self.failures + 1, explain(error))


# What a call of the daemon raises; ValueError where it answers in another shape than ours.
PROBLEMS = (ApplianceError, ValueError)


def explain(error: Exception) -> str:
    """A problem in words, with what to do about it."""
    if isinstance(error, ApplianceError):
        return str(error)
    return "the daemon speaks another version of the control API — restart it and the dashboard"


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, capped, for ever."""
    return min(_FIRST_WAIT * 2.0 ** max(0, failures - 1), _LONGEST_WAIT)


class Alarm:
    """Sleeps that one call ends early."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake all who sleep now."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
