"""Tools, calls and thoughts as programs write them: nothing that is in them is lost."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.data.dropped import Dropped
from appliance.data.formats import to_canonical

ASKED = {"role": "user", "content": "How warm is it in Rome?"}
RESULT = {"role": "tool", "content": "20"}
ANSWERED = {"role": "assistant", "content": "It is 20 degrees."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}


def messages(*said: Any, **row: Any) -> list[dict[str, Any]]:
    return list(to_canonical({"messages": list(said), **row}).row["messages"])


@pytest.mark.parametrize(
    "call",
    [
        {"name": "weather", "args": {"place": "Rome"}, "type": "tool_call"},
        {"name": "weather", "parameters": {"place": "Rome"}},
        {"function": {"name": "weather", "args": {"place": "Rome"}}},
        {"function": {"name": "weather", "arguments": '{"place": "Rome"}'}},
        {"type": "tool_use", "name": "weather", "input": {"place": "Rome"}},
    ],
)
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_arguments_are_read_by_every_name_that_they_have(call: dict[str, Any], key: str) -> None:
    given = [call] if key == "tool_calls" else call
    _, called, *_ = messages(ASKED, {"role": "assistant", "content": "", key: given}, RESULT, ANSWERED)
    assert called["tool_calls"] == [CALL]


def test_what_a_call_and_a_tool_have_beside_is_told() -> None:
    call = {**CALL, "output": "20", "weight": 0}
    tool = {"name": "weather", "description": "", "input_schema": {"type": "object"}, "returns": "degrees"}
    asked = {"role": "assistant", "tool_calls": [call], "function_call": {"name": "other", "arguments": {}}}
    found = to_canonical({"messages": [ASKED, asked, RESULT, ANSWERED], "tools": [tool]})
    assert set(found.unread) == {
        "messages[].tool_calls[].output",
        "messages[].tool_calls[].weight",
        "messages[].function_call",
        "tools[].returns",
    }


def test_a_call_without_arguments_is_no_call() -> None:
    with pytest.raises(Dropped) as caught:
        messages(ASKED, {"role": "assistant", "tool_calls": [{"name": "weather"}]}, RESULT, ANSWERED)
    assert caught.value.code == "bad_tool_call"


def test_a_turn_that_is_a_call_has_its_own_weight_and_thought() -> None:
    called = {"from": "function_call", "value": '{"name": "weather", "arguments": {"place": "Rome"}}', "loss": False}
    turns = [{"from": "human", "value": "Q"}, {**called, "reasoning_content": "Hm."}]
    turns += [{"from": "observation", "value": "20"}, {"from": "gpt", "value": "20"}]
    row = to_canonical({"conversations": turns}).row
    assert row["messages"][1] == {
        **{"role": "assistant", "content": "", "tool_calls": [CALL]},
        **{"weight": 0, "reasoning_content": "Hm."},
    }


def test_messages_that_are_calls_one_after_the_other_are_one_turn() -> None:
    said = [{"role": "tool_call", "content": {"name": "weather", "arguments": {"place": place}}} for place in "ab"]
    found = messages(ASKED, *said, RESULT, RESULT, ANSWERED)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"]["arguments"]["place"] for call in found[1]["tool_calls"]] == ["a", "b"]


def test_results_that_are_parts_of_a_message_are_messages() -> None:
    used = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"place": "Rome"}}
    parts = [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "20"}]}]
    found = messages(
        ASKED,
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, used]},
        {"role": "user", "content": [*parts, {"type": "text", "text": "And?"}]},
        ANSWERED,
    )
    assert found[1]["content"] == "Let me see."
    assert found[2:4] == [{"role": "tool", "content": "20", "tool_call_id": "t1"}, {"role": "user", "content": "And?"}]


def test_hermes_marks_are_calls_results_and_tools() -> None:
    system = 'You are a function calling AI model.\n<tools>\n[{"name": "weather", "parameters": {}}]\n</tools>'
    call = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
    turns = [("system", system), ("human", "Q"), ("gpt", call), ("tool", "<tool_response>\n20\n</tool_response>")]
    turns.append(("gpt", "It is 20."))
    found = to_canonical({"conversations": [{"from": who, "value": said} for who, said in turns]})
    assert found.row["tools"] == [{"name": "weather", "parameters": {}}]
    assert found.row["messages"] == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "It is 20."},
    ]
    assert "tools_in_text" in found.odd
    row = {"conversations": [{"from": who, "value": said.replace('"', "'")} for who, said in turns]}
    assert to_canonical(row).row == found.row, "in Python's notation"
    tools = '[{"name": "weather", "parameters": {}}]'
    assert to_canonical({**row, "tools": tools}).unread == (), "which say the same"
    assert to_canonical({**row, "tools": '[{"name": "other"}]'}).unread == ("tools",)


def test_what_parts_have_beside_is_told_whatever_they_are() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": "20", "is_error": True}
    thought = {"type": "reasoning", "value": "Hm.", "loss_weight": 0}
    call = {"type": "tool_call", "value": '{"name": "f", "arguments": {}}', "loss_weight": 0}
    said = [ASKED, {"role": "assistant", "content": [thought, call]}, {"role": "user", "content": [result], "mask": 1}]
    assert set(to_canonical({"messages": [*said, ANSWERED]}).unread) == {
        *("messages[].content[].loss_weight", "messages[].content[].is_error", "messages[].mask")
    }


FOLDED = (
    '<details type="reasoning" done="true" duration="2">\n<summary>Thought for 2 seconds</summary>\n'
    "&gt; Hm, &lt;b&gt;.\n&gt; Yes.\n</details>\nYes."
)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Hm.\n</think>\n\nYes.", "<think>\nHm.\n</think>\n\nYes."),
        ("<think>\nHm.\n</think>\n\nYes.", "<think>\nHm.\n</think>\n\nYes."),
        (FOLDED, "<think>\nHm, <b>.\nYes.\n</think>\n\nYes."),
        ("Write <think> to begin.", "Write <think> to begin."),
    ],
)
def test_a_thought_in_a_text_stands_between_its_marks(text: str, read: str) -> None:
    assert messages(ASKED, {"role": "assistant", "content": text})[1]["content"] == read


def test_a_thought_that_is_said_twice_is_read_once() -> None:
    said = {"role": "assistant", "content": "<think>Hm.</think>Yes.", "reasoning_content": "Hm."}
    assert messages(ASKED, said)[1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    with pytest.raises(Dropped) as caught:
        messages(ASKED, {**said, "reasoning_content": "No."})
    assert caught.value.code == "two_thoughts"


def test_a_thought_without_an_end_is_no_answer() -> None:
    with pytest.raises(Dropped) as caught:
        messages(ASKED, {"role": "assistant", "content": "<think>\nHm, let me"})
    assert caught.value.code == "cut_thought"


def test_thoughts_given_as_parts_or_beside_the_answer_are_read() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Yes."}]
    thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert messages(ASKED, {"role": "assistant", "content": parts})[1] == thought
    for row in (
        {"prompt": "Q", "completion": "Yes.", "reasoning_content": "Hm."},
        {"instruction": "Q", "output": "Yes.", "thinking": "Hm."},
    ):
        assert to_canonical(row).row["messages"][1] == thought


@pytest.mark.parametrize("text", ["<thinking>Hm.</thinking>Yes.", "[THINK]Hm.[/THINK]Yes."])
def test_other_marks_of_thoughts_are_told(text: str) -> None:
    assert to_canonical({"prompt": "Q", "completion": text}).odd == ("thought_in_other_marks",)
