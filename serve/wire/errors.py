"""Errors of the chat endpoint, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class ChatError(Exception):
    """An error that a client of the chat endpoint sees.

    `param` names the field at fault, `retry_after` (seconds) says that trying again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def no_engine(message: str) -> ChatError:
    """Nobody can answer now, and somebody may soon."""
    return ChatError(503, message, code="engine_unavailable", retry_after=5)
