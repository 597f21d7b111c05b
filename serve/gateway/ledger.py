"""Feedback on answers. Which answers were given is written down beside the request path, in batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from appliance.store.database import open_database
from appliance.store.feedback import NEWEST_KEPT, Answer, Feedback, Remark
from serve.wire.errors import ChatError

log = logging.getLogger(__name__)

WRITE_SECONDS = 1.0
"""How long an answer may wait to be written down; what a kill of the daemon loses."""

_EXPECTED = {
    "id": "the id of an answer",
    "rating": '"good" or "bad"',
    "correction": "a text that is not empty",
    "comment": "a text that is not empty",
}
# Within a JSON string every quotation mark has a backslash before it, so that no text of an answer matches this.
_ID = re.compile(rb'"id":\s*"([^"\\]+)"')


def read_feedback(request: dict[str, Any]) -> Remark:
    """What a request says about an answer; a correction without a rating says that it was bad. Raises ChatError."""
    for name, value in request.items():
        if name not in _EXPECTED:
            raise ChatError(400, f"unknown parameter '{name}'", code="unknown_parameter", param=name)
        if not (value is None or _is_text(value)) or (name == "rating" and value not in ("good", "bad", None)):
            raise ChatError(400, f"'{name}' must be {_EXPECTED[name]}", code="invalid_value", param=name)
    said = {name: value for name, value in request.items() if value is not None}
    for name, missing in (("id", "id" not in said), ("rating", said.keys().isdisjoint({"rating", "correction"}))):
        if missing:
            raise ChatError(400, f"'{name}' is missing", code="missing_parameter", param=name)
    return Remark(**{"rating": "bad", **said})


def _is_text(value: Any) -> bool:
    """Whether it is a text with something in it that can be stored: no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


class Ledger:
    """The answers that are given, and what is said about them, on their way to the database at `path`.

    A disk that fails costs no answer: what cannot be written waits in memory, and the newest are kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[Answer] = deque(maxlen=NEWEST_KEPT)
        self._writing = asyncio.Lock()

    def note(self, part: bytes, release: str, key: str) -> None:
        """An answer begins with `part`, its first events or the whole of it."""
        if found := _ID.search(part):
            self._waiting.append(Answer(found[1].decode(), release, key, time.time()))

    async def give(self, remark: Remark, key: str) -> None:
        """Keep what the holder of `key` says. It is on disk afterwards. Raises ChatError where it cannot be."""
        try:
            found = await self.write(remark, key)
        except Exception:
            log.exception("feedback could not be written down")
            raise ChatError(
                503, "the feedback could not be written down; try again later", code="not_written", retry_after=60
            ) from None
        if not found:
            raise ChatError(
                404, f"no answer with the id '{remark.id}' was given to you here", code="unknown_answer", param="id"
            )

    async def write(self, remark: Remark | None = None, key: str = "") -> bool:
        """Write down what waits, then `remark`; whether its answer is known."""
        async with self._writing:
            answers = tuple(self._waiting)
            self._waiting.clear()
            try:
                return await asyncio.to_thread(self._commit, answers, remark, key)
            except BaseException:
                self._waiting = deque((*answers, *self._waiting), maxlen=NEWEST_KEPT)
                raise

    async def serve(self) -> None:
        """Write down what waits, again and again, until cancelled. Of failures in a row the first is logged."""
        failing = False
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            if not self._waiting:
                continue
            try:
                await self.write()
                failing = False
            except Exception:
                if not failing:
                    log.exception("answers could not be written down; trying again")
                failing = True

    def _commit(self, answers: tuple[Answer, ...], remark: Remark | None, key: str) -> bool:
        # A connection of its own, because this is another thread, and a disk that is slow stops no answer.
        with contextlib.closing(open_database(self._path)) as db:
            feedback = Feedback(db)
            if answers:
                feedback.add(answers)
            return remark is None or feedback.give(remark, key)
