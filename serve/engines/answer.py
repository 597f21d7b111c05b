"""An answer in OpenAI's shapes, whole or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

THOUGHT = "reasoning_content"
"""The key of a thought in an answer, by which clients know it."""


@dataclass(frozen=True)
class Piece:
    """What one step of generation adds to one choice."""

    choice: int
    text: str
    tokens: int
    finish_reason: str | None
    thought: str = ""
    """What the model thinks before it says anything."""


class Answer:
    """One chat completion of `model` as its pieces come. `usage`: whether a stream of it ends with the token counts."""

    def __init__(self, model: str, prompt_tokens: int, choices: int, usage: bool) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self._usage_at_end = usage
        self._completion_tokens = 0
        self._texts = [""] * choices
        self._thoughts = [""] * choices
        self._finish_reasons: list[str | None] = [None] * choices
        self._introduced: set[int] = set()

    def add(self, piece: Piece) -> None:
        """Take a piece into the whole."""
        self._completion_tokens += piece.tokens
        self._texts[piece.choice] += piece.text
        self._thoughts[piece.choice] += piece.thought
        self._finish_reasons[piece.choice] = piece.finish_reason

    def whole(self) -> dict[str, Any]:
        """The chat completion."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None}
                | ({THOUGHT: thought} if thought else {}),
                "logprobs": None,
                "finish_reason": finish_reason,
            }
            for index, (text, thought, finish_reason) in enumerate(
                zip(self._texts, self._thoughts, self._finish_reasons, strict=True)
            )
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def chunks(self, piece: Piece) -> bytes:
        """Take a piece in, and tell what it adds as events."""
        self.add(piece)
        events = b""
        if piece.choice not in self._introduced:
            self._introduced.add(piece.choice)
            events += self._chunk(piece.choice, {"role": "assistant", "content": ""}, None)
        if piece.thought:
            events += self._chunk(piece.choice, {THOUGHT: piece.thought}, None)
        if piece.text:
            events += self._chunk(piece.choice, {"content": piece.text}, None)
        if piece.finish_reason:
            events += self._chunk(piece.choice, {}, piece.finish_reason)
        return events

    def last_chunks(self) -> bytes:
        """The events after the last piece."""
        done = b"data: [DONE]\n\n"
        if not self._usage_at_end:
            return done
        return _event({**self._chunk_head(), "choices": [], "usage": self._usage()}) + done

    def _chunk(self, choice: int, delta: dict[str, str], finish_reason: str | None) -> bytes:
        chunk: dict[str, Any] = {
            **self._chunk_head(),
            "choices": [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
        }
        if self._usage_at_end:
            chunk["usage"] = None
        return _event(chunk)

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
