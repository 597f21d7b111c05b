"""Rows as vendors' files and chat programs' exports have them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from importing import Import

from appliance.data.dropped import Dropped
from appliance.data.formats import to_canonical

ASKED = {"role": "user", "content": "How warm is it in Rome?"}
ANSWERED = {"role": "assistant", "content": "It is 20 degrees."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"degrees": 20}'}
FUNCTION = {"name": "weather", "description": "How it is outside", "parameters": {"type": "object"}}

VERTEX: dict[str, Any] = {
    "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
    "contents": [
        {"role": "user", "parts": [{"text": "How warm is it in Rome?"}]},
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"place": "Rome"}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"degrees": 20}}}]},
        {"role": "model", "parts": [{"text": "It is 20 degrees."}]},
    ],
    "tools": [{"functionDeclarations": [FUNCTION]}],
}
TRANSCRIPT = {
    "system": "SYSTEM: You are helpful with access to the following functions. Use them if required -\n"
    + json.dumps(FUNCTION, indent=4)
    + "\n",
    "chat": "USER: How warm is it in Rome?\n\n\nASSISTANT: <functioncall> "
    + """{"name": "weather", "arguments": '{"place": "Rome"}'} <|endoftext|>\n\n\nFUNCTION RESPONSE: """
    + """{"degrees": 20}\n\n\nASSISTANT: It is 20 degrees. <|endoftext|>\n\n\n""",
}
CHAT: dict[str, Any] = {
    "id": "c1",
    "title": "Weather",
    "chat": {
        "models": ["m"],
        "params": {"system": "Be brief."},
        "messages": [],
        "history": {
            "currentId": "d",
            "messages": {
                "a": {"id": "a", "parentId": None, "role": "user", "content": "How warm is it in Rome?"},
                "b": {"id": "b", "parentId": "a", "role": "assistant", "content": "I do not know."},
                "d": {"id": "d", "parentId": "a", "role": "assistant", "content": "It is 20 degrees.", "done": True},
            },
        },
    },
}
LIBRE: dict[str, Any] = {
    "conversationId": "c1",
    "options": {"model": "m"},
    "messages": [
        {"messageId": "1", "sender": "User", "isCreatedByUser": True, "text": "How warm is it in Rome?"},
        {"messageId": "2", "sender": "m", "isCreatedByUser": False, "text": "It is 20 degrees."},
    ],
}
TYPED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "value": "How warm is it in Rome?"}], "loss_weight": 0.0},
        {
            "role": "assistant",
            "content": [
                {"type": "reasoning", "value": "I look."},
                {"type": "tool_call", "value": '{"name": "weather", "arguments": {"place": "Rome"}}'},
            ],
            "loss_weight": 0.0,
        },
        {"role": "tool", "content": [{"type": "text", "value": '{"degrees": 20}'}]},
        {"role": "assistant", "content": [{"type": "text", "value": "It is 20 degrees."}], "loss_weight": 1.0},
    ]
}
BRIEF = {"role": "system", "content": "Be brief."}
PAIR = {"messages": [ASKED, ANSWERED]}


@pytest.mark.parametrize(
    ("value", "row"),
    [
        (VERTEX, {"messages": [BRIEF, ASKED, CALLED, {**RESULT, "name": "weather"}, ANSWERED], "tools": [FUNCTION]}),
        (
            TRANSCRIPT,
            {
                "messages": [
                    {"role": "system", "content": "You are helpful."},
                    ASKED,
                    CALLED,
                    RESULT,
                    ANSWERED,
                ],
                "tools": [FUNCTION],
            },
        ),
        (CHAT, {"messages": [BRIEF, ASKED, ANSWERED]}),
        (LIBRE, PAIR),
        (
            TYPED,
            {
                "messages": [
                    ASKED,
                    {**CALLED, "weight": 0, "reasoning_content": "I look."},
                    RESULT,
                    ANSWERED,
                ]
            },
        ),
        (
            {"query": ASKED["content"], "answers": json.dumps([CALL["function"]]), "tools": json.dumps([FUNCTION])},
            {"messages": [ASKED, CALLED], "tools": [FUNCTION]},
        ),
        ({"data": {"prompt": ASKED["content"], "response": ANSWERED["content"]}, "id": 7}, PAIR),
        ({"row_idx": 0, "row": {"question": ASKED["content"], "answer": ANSWERED["content"]}}, PAIR),
        ({"input": ASKED["content"], "output": ANSWERED["content"]}, PAIR),
    ],
)
def test_they_are_read_whole(value: Any, row: Any) -> None:
    found = to_canonical(value)
    assert found.row == row


def test_what_is_around_a_row_and_beside_a_branch_is_told() -> None:
    around = {"data": {"prompt": "a", "response": "b"}, "annotations": [{"result": []}], "id": 7}
    assert to_canonical(around).unread == ("annotations", "id")
    assert to_canonical(CHAT).odd == ("other_branches",)
    assert to_canonical({**CHAT["chat"]["history"]["messages"]["a"], "data": {}, **PAIR}).row == PAIR


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"contents": "a"}, "unknown_format"),
        ({"contents": [{"role": "user", "parts": "a"}]}, "unknown_format"),
        ({"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]}, "not_text"),
        ({"system": "", "chat": "Hello"}, "unknown_format"),
        ({"system": 7, "chat": "USER: a"}, "unknown_format"),
        ({"chat": "a"}, "unknown_format"),
        ({"query": "q", "answers": "none"}, "bad_tool_call"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "value": "a.png"}]}]}, "not_text"),
    ],
)
def test_what_is_none_of_them_is_dropped_with_the_reason(value: Any, code: str) -> None:
    with pytest.raises(Dropped) as caught:
        to_canonical(value)
    assert caught.value.code == code


def test_an_export_of_one_chat_is_one_row(imported: Import) -> None:
    assert imported(json.dumps(LIBRE).encode(), "chat.json")["kept"] == 1
    assert imported(json.dumps([CHAT, CHAT]).encode(), "chats.json")["duplicates"] == 1


def test_names_of_vertex_may_be_in_either_spelling() -> None:
    snake = json.loads(
        json.dumps(VERTEX)
        .replace("systemInstruction", "system_instruction")
        .replace("functionDeclarations", "function_declarations")
        .replace("functionCall", "function_call")
        .replace("functionResponse", "function_response")
    )
    assert to_canonical(snake) == to_canonical(VERTEX)
    assert to_canonical(snake).unread == ()


def test_a_thought_of_vertex_is_no_answer() -> None:
    value = json.loads(json.dumps(VERTEX))
    value["contents"][-1]["parts"].insert(0, {"text": "Hm.", "thought": True})
    assert to_canonical(value).row["messages"][-1] == {**ANSWERED, "reasoning_content": "Hm."}


def test_a_transcript_may_say_something_beside_its_call() -> None:
    value = {**TRANSCRIPT, "chat": TRANSCRIPT["chat"].replace("<functioncall>", "Let me see. <functioncall>")}
    assert to_canonical(value).row["messages"][2] == {**CALLED, "content": "Let me see."}
    with pytest.raises(Dropped):
        to_canonical({**TRANSCRIPT, "chat": f"Before. {TRANSCRIPT['chat']}"})


def test_a_chat_has_its_system_prompt_in_either_place() -> None:
    chat = {**CHAT["chat"], "system": "Be kind.", "params": {}}
    assert to_canonical({"chat": chat}).row["messages"][0]["content"] == "Be kind."
    with pytest.raises(Dropped) as caught:
        to_canonical({"chat": {**chat, "params": {"system": "Be brief."}}})
    assert caught.value.code == "two_system_messages"


def test_a_chat_whose_messages_are_their_own_parents_ends() -> None:
    message = {**CHAT["chat"]["history"]["messages"]["a"], "parentId": "a"}
    answer = {**CHAT["chat"]["history"]["messages"]["d"], "parentId": "a"}
    history = {"currentId": "d", "messages": {"a": message, "d": answer}}
    assert to_canonical({"chat": {"history": history}}).row["messages"] == [ASKED, ANSWERED]


def test_parts_are_joined_as_the_endpoint_does() -> None:
    parts = [{"type": "output_text", "text": "One."}, {"type": "text", "text": "Two."}]
    thoughts = [{"type": "reasoning", "value": "Hm."}, {"type": "think", "value": "Yes."}]
    said = {"role": "assistant", "content": [*thoughts, *parts]}
    assert to_canonical({"messages": [ASKED, said]}).row["messages"][1] == {
        **{"role": "assistant", "content": "One.\nTwo.", "reasoning_content": "Hm.\nYes."},
    }


def test_what_says_another_thing_under_a_second_name_is_told() -> None:
    said = {"role": "assistant", "content": "One.", "value": "Two."}
    assert to_canonical({"messages": [ASKED, said]}).unread == ("messages[].value",)
    asked = {**ASKED, "tool_calls": [CALL]}
    assert to_canonical({"messages": [asked, ANSWERED]}).unread == ("messages[].tool_calls",)
    thought = {**ANSWERED, "reasoning": "a", "thinking": "b"}
    assert to_canonical({"messages": [ASKED, thought]}).unread == ("messages[].thinking",)


def test_a_result_without_a_call_is_out_of_order() -> None:
    with pytest.raises(Dropped, match="tool follows system") as caught:
        to_canonical({"messages": [BRIEF, RESULT, ASKED, ANSWERED]})
    assert caught.value.code == "roles_out_of_order"
    continued = to_canonical({"messages": [RESULT, ASKED, ANSWERED][1:]})
    assert continued.row == PAIR
