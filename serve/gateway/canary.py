"""The canary's place in the gateway: whose requests it answers, and the count of both sides' answers."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from appliance.canary import Comparison, Tally
from serve.gateway.observation import Observation
from serve.gateway.relay import Upstream
from serve.wire.errors import ChatError
from serve.wire.fields import MODEL_ALIAS

CONVERSATION_HEADER = b"x-conversation-id"
_NAMES = ("prompt_cache_key", "safety_identifier", "user")
"""Fields by which clients name a conversation or a person, the narrowest first."""


@dataclass(frozen=True)
class Canary:
    """The candidate's engine, the share of conversations that it is to answer, and the figures so far."""

    upstream: Upstream
    share: float
    comparison: Comparison

    def takes(self, request: dict[str, Any], conversation: str | None) -> bool:
        """Whether the candidate is to answer: it was asked for by its name, or the conversation falls to it."""
        model = request.get("model") or MODEL_ALIAS
        if model != MODEL_ALIAS:
            return bool(model == self.upstream.route.model)
        return conversation is not None and chosen(f"{self.comparison.candidate}/{conversation}", self.share)


def chosen(conversation: str, share: float) -> bool:
    """Whether a conversation belongs to the `share` (0 to 1) of all. A larger share only adds to a smaller one."""
    digest = hashlib.blake2b(conversation.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def conversation_of(request: dict[str, Any], header: str, caller: str) -> str | None:
    """What a request names its conversation by: the header, a field, else the API key; None: by nothing.

    `caller` is the key's id, empty for an operator: conversations of two keys are never the same.
    """
    names = (("header", header), *((field, request.get(field)) for field in _NAMES))
    kind, name = next(((kind, name) for kind, name in names if isinstance(name, str) and name), ("", ""))
    return f"{caller}/{kind}/{name}" if caller or name else None


@contextlib.contextmanager
def counted(tally: Tally | None) -> Iterator[Observation | None]:
    """Watch an answer, and count it in the end: a failure of the engine, or how it went. No tally: neither.

    A refusal of the client's request and a client that leaves are not counted.
    """
    if tally is None:
        yield None
        return
    seen = Observation()
    try:
        yield seen
    except ChatError as error:
        seen.complete = False
        if error.status >= 500:
            tally.add_error()
        raise
    finally:
        # A client that has its whole answer may be gone before this is reached: then it is cancelled, and counts.
        if seen.complete and seen.failed:
            tally.add_error()
        elif seen.complete:
            tally.add_answer(seen.stops, seen.seconds)
