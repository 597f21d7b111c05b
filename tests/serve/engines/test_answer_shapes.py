"""Answers have OpenAI's shapes to the letter."""

from __future__ import annotations

import json
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve.engines.answer import Answer, Piece

PIECES = [
    Piece(0, "Hel", 1, None),
    Piece(1, "", 1, None),
    Piece(0, "lo", 2, None),
    Piece(1, "Hi", 1, "stop"),
    Piece(0, "", 1, "length"),
]


def events(text: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in text.split(b"\n\n") if line.startswith(b"data: {")]


def stream(usage: bool) -> list[Any]:
    answer = Answer("r1", 7, 2, usage)
    text = b"".join(answer.chunks(piece) for piece in PIECES) + answer.last_chunks()
    assert text.endswith(b"data: [DONE]\n\n")
    return events(text)


def test_a_whole_answer() -> None:
    answer = Answer("r1", 7, 2, False)
    for piece in PIECES:
        answer.add(piece)
    whole = answer.whole()
    completion = ChatCompletion.model_validate(whole, strict=True)
    assert [choice.message.content for choice in completion.choices] == ["Hello", "Hi"]
    assert [choice.finish_reason for choice in completion.choices] == ["length", "stop"]
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens) == (
        7,
        6,
        13,
    )
    assert whole["choices"][0]["message"]["refusal"] is None


def test_chunks_of_each_choice_begin_with_the_role_and_end_with_the_reason() -> None:
    chunks = stream(usage=False)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)
    deltas = [
        [
            (chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"])
            for chunk in chunks
            if chunk["choices"][0]["index"] == index
        ]
        for index in (0, 1)
    ]
    begin = ({"role": "assistant", "content": ""}, None)
    assert deltas == [
        [begin, ({"content": "Hel"}, None), ({"content": "lo"}, None), ({}, "length")],
        [begin, ({"content": "Hi"}, None), ({}, "stop")],
    ]


def test_usage_comes_last_and_is_null_before() -> None:
    *chunks, last = stream(usage=True)
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}


def test_a_thought_has_a_key_of_its_own_whole_and_in_chunks() -> None:
    pieces = [Piece(0, "", 1, None, "I add"), Piece(0, "", 1, None, "."), Piece(0, "Four.", 1, "stop")]
    answer = Answer("r1", 7, 1, False)
    deltas = [event["choices"][0]["delta"] for piece in pieces for event in events(answer.chunks(piece))]
    thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    assert thoughts == ["I add", "."]
    assert [delta.get("content") for delta in deltas if delta.get("content")] == ["Four."]
    message = answer.whole()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Four.", "I add.")
    ChatCompletion.model_validate(answer.whole(), strict=True)
