"""The canary's place in the gateway: which conversations it answers, and the count of both sides' answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from appliance.canary import FIRST_TOKEN, LATER_TOKEN, WHOLE_ANSWER, Comparison
from serve.gateway.account import Account


@dataclass(frozen=True)
class Canary:
    """The share of conversations that the candidate is to answer, and the figures so far."""

    share: float
    comparison: Comparison

    def takes(self, conversation: str | None) -> bool:
        """Whether the conversation falls to the candidate."""
        return conversation is not None and chosen(f"{self.comparison.candidate}/{conversation}", self.share)

    def count(self, account: Account) -> None:
        """Count what has become of an answer: a failure of the engine, or how it went.

        A refusal of the client's request and a client that leaves are not counted.
        """
        tally = self.comparison.tally(account.model)
        if tally is None:
            return
        if account.failed:
            tally.add_error()
        elif account.complete:
            tally.add_answer(account.finish, timings(account))


def chosen(conversation: str, share: float) -> bool:
    """Whether a conversation belongs to the `share` (0 to 1) of all. A larger share only adds to a smaller one."""
    digest = hashlib.blake2b(conversation.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def timings(account: Account) -> dict[str, float]:
    """Times of an answer by the names of `appliance.canary.TIMINGS`. An event with text counts as a token."""
    sent, first, last = account.sent, account.first_byte, account.last_byte
    if sent is None or first is None or last is None:
        return {}
    if not account.streamed:
        return {WHOLE_ANSWER: (last - sent) / account.completion_tokens} if account.completion_tokens else {}
    seconds = {FIRST_TOKEN: first - sent}
    if account.pieces > 1 and account.first_text is not None and account.last_text is not None:
        seconds[LATER_TOKEN] = (account.last_text - account.first_text) / (account.pieces - 1)
    return seconds
