"""Errors of the chat endpoint, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

MOST_SHOWN = 64
"""Characters of a client's own words that an error repeats."""


class ChatError(Exception):
    """An error that a client of the chat endpoint sees.

    `param` names the field at fault, `retry_after` (seconds) says that trying again may help, `allow` which methods
    there are.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    def headers(self) -> dict[str, str]:
        """What a client's program reads of it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.allow:
            headers["allow"] = self.allow
        return headers

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def no_engine(message: str, retry_after: int = 5) -> ChatError:
    """Nobody can answer now, and somebody may in so many seconds."""
    return ChatError(503, message, code="engine_unavailable", retry_after=retry_after)


def shown(text: str) -> str:
    """What a client has sent, as it is repeated or recorded: as text that can be written, and not all of it."""
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
    return text.encode("utf-8", "replace").decode()
