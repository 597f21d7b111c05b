"""Chat completions: what a request names its conversation by, and what its answer tells of itself as it passes."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any

from serve.gateway.account import Account

PATH = "/v1/chat/completions"
SURFACE = "chat"

_CONVERSATION_FIELDS = ("prompt_cache_key", "safety_identifier", "user")
"""Fields by which clients name a conversation or a person, the narrowest first."""

_LAST_EVENT = b"data: [DONE]\n\n"
# Within a JSON string every quotation mark has a backslash before it, so that no text of an answer matches these.
_ID = re.compile(rb'"id":\s*"([^"\\]+)"')
_STOP = re.compile(rb'"finish_reason":\s*"(\w+)"')
_TEXT = re.compile(rb'"content":\s*"[^"]')
_FAILURE = re.compile(rb'^data:\s*\{"error"', re.MULTILINE)
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_NO_CHOICES = re.compile(rb'"choices":\s*\[\]')
_NO_USAGE = re.compile(rb',\s*"usage":\s*null')


def conversation_of(request: dict[str, Any], header: str, caller: str) -> str | None:
    """What a request names its conversation by: the header, a field, else the API key; None: by nothing.

    `caller` is the key's id, empty for an operator: conversations of two keys are never the same.
    """
    names = (("header", header), *((field, request.get(field)) for field in _CONVERSATION_FIELDS))
    kind, name = next(((kind, name) for kind, name in names if isinstance(name, str) and name), ("", ""))
    return f"{caller}/{kind}/{name}" if caller or name else None


def choices(admitted: dict[str, Any]) -> int:
    """How many answers a request asks for."""
    return int(admitted.get("n", 1))


def longest_answer(admitted: dict[str, Any], longest: int) -> int:
    """Tokens that an answer to it may have, where the engine gives none more than `longest`."""
    asked = admitted.get("max_completion_tokens", admitted.get("max_tokens", longest))
    return min(int(asked), longest)


def told_usage(admitted: dict[str, Any], honours: Set[str]) -> dict[str, Any]:
    """The request such that the engine tells how many tokens it was, also in a stream whose client did not ask."""
    if not admitted.get("stream") or "stream_options" not in honours:
        return admitted
    return admitted | {"stream_options": {**admitted.get("stream_options", {}), "include_usage": True}}


class Answer:
    """The answer to one request on its way from the engine to the client; what it shows goes to `account`."""

    def __init__(self, account: Account, admitted: dict[str, Any]) -> None:
        self.account = account
        self._tells_usage = bool(admitted.get("stream_options", {}).get("include_usage"))

    def events(self, frames: bytes) -> bytes:
        """Whole events of a stream have come; what of them the client gets."""
        account, now = self.account, self.account.elapsed()
        if account.first_byte is None:
            account.streamed, account.first_byte = True, now
            self._identify(frames)
        account.last_byte = now
        account.complete = frames.endswith(_LAST_EVENT)
        account.failed |= bool(_FAILURE.search(frames))
        if pieces := len(_TEXT.findall(frames)):
            account.pieces += pieces
            account.first_text = now if account.first_text is None else account.first_text
            account.last_text = now
        self._end(frames)
        return _as_clients_read(frames if self._tells_usage else _without_usage(frames))

    def document(self, body: bytes) -> bytes:
        """The whole answer has come; what the client gets."""
        account = self.account
        account.first_byte = account.last_byte = account.elapsed()
        account.complete = True
        self._identify(body)
        self._end(body)
        return _as_clients_read(body)

    def _identify(self, part: bytes) -> None:
        if found := _ID.search(part):
            self.account.answer = found[1].decode("utf-8", "replace")

    def _end(self, part: bytes) -> None:
        self.account.finish += [reason.decode() for reason in _STOP.findall(part)]
        if b'"usage"' in part:
            if found := _PROMPT_TOKENS.search(part):
                self.account.prompt_tokens = int(found[1])
            if found := _COMPLETION_TOKENS.search(part):
                self.account.completion_tokens = int(found[1])


def _without_usage(frames: bytes) -> bytes:
    """The events without the one that tells how many tokens it were, and without the word in the others."""
    if b'"usage"' not in frames:
        return frames
    kept = [event for event in frames.split(b"\n\n") if b'"usage"' not in event or not _NO_CHOICES.search(event)]
    return _NO_USAGE.sub(b"", b"\n\n".join(kept))


def _as_clients_read(answer: bytes) -> bytes:
    """An answer with a thought under the key that most clients read, and not the one that vLLM has for it."""
    # A text in JSON has a backslash before each quote, so that this is a key.
    return answer.replace(b'"reasoning":', b'"reasoning_content":')
