"""The gateway's way to the record of traffic: accounts go there, and what is said about answers."""

from __future__ import annotations

import asyncio
import logging

from appliance.traffic import Remark, Request, Traffic
from serve.gateway.account import Account
from serve.wire.errors import ChatError, shown

log = logging.getLogger(__name__)


class Ledger:
    """Records in `traffic`, which waits for the disk where nobody waits for it."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def begun(self, account: Account) -> None:
        """An answer begins: from now on something can be said about it."""
        self._traffic.note(_request(account))

    def settled(self, account: Account) -> None:
        """A request has ended."""
        self._traffic.note(_request(account))
        log.info(
            "%s of %s: %d %s, %s by %s (%s) in %.2f s, tokens %s and %s",
            account.id,
            account.caller or "an operator",
            account.status,
            account.error or ",".join(account.finish) or "left",
            account.surface,
            account.model or "nobody",
            account.deployment or "none",
            account.elapsed(),
            account.prompt_tokens,
            account.completion_tokens,
        )

    async def give(self, remark: Remark, caller: str) -> None:
        """Keep what the holder of a key says. It is on disk afterwards. Raises ChatError where it cannot be."""
        try:
            found = await asyncio.wrap_future(self._traffic.give(remark, caller))
        except Exception as error:
            log.error("feedback could not be written down: %s", error)
            raise ChatError(
                503, "the feedback could not be written down; try again later", code="not_written", retry_after=60
            ) from None
        if not found:
            message = f"no answer with the id '{shown(remark.id)}' was given to you here"
            raise ChatError(404, message, code="unknown_answer", param="id")


def _request(account: Account) -> Request:
    def at(seconds: float | None) -> float | None:
        return None if seconds is None else account.arrived + seconds

    return Request(
        id=account.id,
        surface=account.surface,
        key=account.caller,
        conversation=account.conversation,
        asked=account.asked,
        deployment=account.deployment,
        model=account.model,
        answer=account.answer,
        status=account.status,
        error=account.error,
        finish=",".join(account.finish),
        prompt_tokens=account.prompt_tokens,
        completion_tokens=account.completion_tokens,
        arrived=account.arrived,
        sent=at(account.sent),
        first_byte=at(account.first_byte),
        last_byte=at(account.last_byte),
    )
