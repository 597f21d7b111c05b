"""What a chat completion tells of itself: its conversation, and how its answer goes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.gateway.account import Account
from serve.gateway.surfaces.chat import Answer, conversation_of, told_usage

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
LAST = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("request_fields", "header", "caller", "name"),
    [
        ({}, "", "", None),
        ({}, "", "k1", "k1//"),
        ({"user": "u"}, "", "k1", "k1/user/u"),
        ({"user": "u", "safety_identifier": "s"}, "", "k1", "k1/safety_identifier/s"),
        ({"user": "u", "safety_identifier": "s", "prompt_cache_key": "p"}, "", "k1", "k1/prompt_cache_key/p"),
        ({"prompt_cache_key": "p"}, "c", "k1", "k1/header/c"),
        ({"prompt_cache_key": "", "user": 7}, "", "k1", "k1//"),
        ({"user": "u"}, "", "", "/user/u"),
        ({}, "c", "", "/header/c"),
    ],
)
def test_what_names_a_conversation(request_fields: dict[str, Any], header: str, caller: str, name: str | None) -> None:
    assert conversation_of({**ASK, **request_fields}, header, caller) == name


def chunk(text: str, finish_reason: str | None = None, **more: Any) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"id": "a-1", "choices": [choice], **more}).encode() + b"\n\n"


def usage_event(**shape: Any) -> bytes:
    """The event that tells how many tokens it were."""
    return b"data: " + json.dumps({"id": "a-1", "choices": [], "usage": USAGE}, **shape).encode() + b"\n\n"


def answer(asked: dict[str, Any] | None = None) -> Answer:
    return Answer(Account("chat", "k1"), asked or {"stream": True})


def test_no_text_of_an_answer_is_taken_for_its_end() -> None:
    seen = answer()
    seen.events(chunk('"finish_reason": "length"') + chunk('data: {"error": "content": "x"'))
    seen.document(b'{"choices": [{"message": {"content": "\\"finish_reason\\": \\"length\\""}}]}')
    assert (seen.account.finish, seen.account.failed) == ([], False)


def test_every_choice_has_its_end_in_either_spelling() -> None:
    seen = answer()
    seen.events(b'data: {"choices":[{"finish_reason":"stop"}]}\n\ndata: {"choices": [{"finish_reason": "length"}]}\n\n')
    seen.events(b'data: {"choices": [{"finish_reason": null}]}\n\n')
    assert seen.account.finish == ["stop", "length"]


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")], ids=["json", "compact"])
@pytest.mark.parametrize("together", [True, False])
def test_tokens_are_known_and_told_only_to_those_who_asked(separators: tuple[str, str], together: bool) -> None:
    pieces = [chunk("Hel", usage=None), chunk("lo", "stop"), usage_event(separators=separators), LAST]
    stream = [b"".join(pieces)] if together else pieces
    unasked = answer()
    assert b"".join(map(unasked.events, stream)) == chunk("Hel") + chunk("lo", "stop") + LAST
    asked = answer({"stream": True, "stream_options": {"include_usage": True}})
    assert b"".join(map(asked.events, stream)) == b"".join(pieces)
    for seen in (unasked, asked):
        account = seen.account
        assert (account.prompt_tokens, account.completion_tokens, account.complete) == (3, 2, True)
        assert (account.answer, account.finish, account.pieces) == ("a-1", ["stop"], 2)


def test_a_text_that_speaks_of_usage_stays() -> None:
    text = ', "usage": null} "choices": [] "usage": {"prompt_tokens": 9}'
    seen = answer()
    assert seen.events(chunk(text)) == chunk(text)
    assert seen.account.prompt_tokens is None


@pytest.mark.parametrize(
    ("asked", "passed"),
    [
        ({}, None),
        ({"stream": False}, None),
        ({"stream": True}, {"include_usage": True}),
        ({"stream": True, "stream_options": {"include_usage": False}}, {"include_usage": True}),
    ],
)
def test_the_engine_is_always_asked_for_tokens(asked: dict[str, Any], passed: dict[str, Any] | None) -> None:
    assert told_usage(asked, {"stream", "stream_options"}).get("stream_options") == passed
    assert told_usage(asked, {"stream"}) == asked
