"""A conversation with the live model."""

from __future__ import annotations

from typing import Any


class Conversation:
    """Turns so far. A question that got no answer is forgotten, so that the next one is not asked after it."""

    def __init__(self) -> None:
        self._turns: list[dict[str, Any]] = []
        self._question = ""
        self._answer: list[str] = []

    def ask(self, text: str) -> list[dict[str, Any]]:
        """The messages to send for this question."""
        self._question, self._answer = text, []
        return [*self._turns, {"role": "user", "content": text}]

    def take(self, piece: str) -> None:
        """Add a piece of the answer."""
        self._answer.append(piece)

    def close(self) -> None:
        """The answer has ended, by itself or because it was stopped."""
        if self._answer:
            answer = "".join(self._answer)
            self._turns += [
                {"role": "user", "content": self._question},
                {"role": "assistant", "content": answer},
            ]
        self._question, self._answer = "", []
