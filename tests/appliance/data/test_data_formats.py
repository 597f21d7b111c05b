from __future__ import annotations

import json
from typing import Any

import pytest

from appliance.data.formats import Dropped, to_canonical

ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
DIALOGUE = {"messages": [ASKED, ANSWERED]}
OTHER = {"role": "assistant", "content": "b"}
JUDGED = {"prompt": [ASKED], "completion": [ANSWERED]}
PAIR = {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [OTHER]}


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns], **more}


@pytest.mark.parametrize(
    ("value", "format", "row"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", DIALOGUE),
        ({"instruction": "q", "output": "a"}, "alpaca", DIALOGUE),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["x", "y"]]},
            "alpaca",
            {
                "messages": [
                    SYSTEM,
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y"},
                    {"role": "user", "content": "q\n\ni"},
                    ANSWERED,
                ]
            },
        ),
        (sharegpt(("human", "q"), ("gpt", "a")), "sharegpt", DIALOGUE),
        (
            sharegpt(("system", "s"), ("user", "q"), ("assistant", "a")),
            "sharegpt",
            {"messages": [SYSTEM, ASKED, ANSWERED]},
        ),
        (
            sharegpt(
                ("human", "q"),
                ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                ("observation", "o"),
                ("gpt", "a"),
                tools='[{"name": "f"}]',
            ),
            "sharegpt",
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "o"},
                    ANSWERED,
                ],
                "tools": [{"name": "f"}],
            },
        ),
        (
            sharegpt(("human", "q"), chosen={"from": "gpt", "value": "a"}, rejected={"from": "gpt", "value": "b"}),
            "sharegpt",
            PAIR,
        ),
        ({"conversation": [{"input": "q", "output": "a"}]}, "turns", DIALOGUE),
        (
            {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "q", "output": "a"}]},
            "turns",
            {"messages": [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED]},
        ),
        (DIALOGUE, "openai", DIALOGUE),
        (
            {"messages": [{"role": "developer", "content": "s"}, ASKED, {**ANSWERED, "weight": 1}], "id": 7},
            "openai",
            {"messages": [SYSTEM, ASKED, ANSWERED]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWERED]},
            "openai",
            DIALOGUE,
        ),
        (
            {
                "messages": [
                    ASKED,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                        ],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "o"},
                    ANSWERED,
                ]
            },
            "openai",
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "o", "tool_call_id": "1"},
                    ANSWERED,
                ]
            },
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", PAIR),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
            "preference",
            {**PAIR, "prompt": [SYSTEM, ASKED]},
        ),
        (PAIR, "preference", PAIR),
        (
            {"prompt": "q", "chosen": [ASKED, *PAIR["chosen"]], "rejected": [ASKED, *PAIR["rejected"]]},
            "preference",
            PAIR,
        ),
        ({"chosen": [ASKED, *PAIR["chosen"]], "rejected": [ASKED, *PAIR["rejected"]]}, "preference", PAIR),
        (
            {"chosen": [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED], "rejected": [SYSTEM, ASKED, ANSWERED, ASKED, OTHER]},
            "preference",
            {"prompt": [SYSTEM, ASKED, ANSWERED, ASKED], "chosen": [ANSWERED], "rejected": [OTHER]},
        ),
        (
            {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED, ASKED, OTHER], "system": "s"},
            "preference",
            {"prompt": [SYSTEM, ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED, ASKED, OTHER]},
        ),
        ({"prompt": "q", "completion": "a"}, "completion", DIALOGUE),
        ({"prompt": "q", "completion": "a", "system": "s"}, "completion", {"messages": [SYSTEM, ASKED, ANSWERED]}),
        ({"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]}, "completion", {"messages": [SYSTEM, ASKED, ANSWERED]}),
        ({"prompt": [ASKED], "completion": [ASKED, ANSWERED]}, "completion", DIALOGUE),
        ({**DIALOGUE, "label": "greeting"}, "openai", DIALOGUE),
        ({**DIALOGUE, "label": 1}, "unpaired", {**JUDGED, "label": True}),
        ({"prompt": "q", "completion": "a", "label": "False"}, "unpaired", {**JUDGED, "label": False}),
        (
            {"messages": [SYSTEM, ASKED, OTHER, ASKED, ANSWERED], "label": 0},
            "unpaired",
            {"prompt": [SYSTEM, ASKED, OTHER, ASKED], "completion": [ANSWERED], "label": False},
        ),
        (
            {"messages": [ASKED, {**OTHER, "weight": 0}, ASKED, {**ANSWERED, "weight": 1.0}]},
            "openai",
            {"messages": [ASKED, {**OTHER, "weight": 0}, ASKED, ANSWERED]},
        ),
        ({**PAIR, "prompt": json.dumps([ASKED])}, "preference", PAIR),
        ({"prompt": "[{x", "completion": "a"}, "completion", {"messages": [{**ASKED, "content": "[{x"}, ANSWERED]}),
        ({"messages": json.dumps(DIALOGUE["messages"])}, "openai", DIALOGUE),
    ],
)
def test_formats(value: dict[str, Any], format: str, row: dict[str, Any]) -> None:
    found = to_canonical(value)
    assert (found.format, found.row, found.trimmed) == (format, row, False)
    assert to_canonical(row).row == row


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "not_an_object"),
        ([1], "not_an_object"),
        ("text", "not_an_object"),
        ({}, "unknown_format"),
        ({"instruction": "q"}, "unknown_format"),
        ({"messages": "q"}, "unknown_format"),
        ({"messages": ["q"]}, "unknown_format"),
        ({"conversation": "q"}, "unknown_format"),
        ({"conversation": ["q"]}, "unknown_format"),
        ({"instruction": "q", "output": ""}, "empty_answer"),
        ({"instruction": "q", "output": None}, "empty_answer"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "empty_answer"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "empty_answer"),
        ({"instruction": " ", "input": "", "output": "a"}, "empty_prompt"),
        ({"messages": []}, "empty_prompt"),
        ({"messages": [SYSTEM]}, "empty_prompt"),
        ({"instruction": 1, "output": "a"}, "not_text"),
        ({"instruction": "q", "output": {"a": 1}}, "not_text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]}, "not_text"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "bad_history"),
        ({"messages": [{"role": "narrator", "content": "q"}, ANSWERED]}, "bad_role"),
        ({"messages": [{"role": 7, "content": "q"}, ANSWERED]}, "bad_role"),
        ({"messages": [{"content": "q"}, ANSWERED]}, "bad_role"),
        ({"messages": [ANSWERED]}, "roles_out_of_order"),
        ({"messages": [ASKED, ASKED, ANSWERED]}, "roles_out_of_order"),
        ({"messages": [ASKED, ANSWERED, ANSWERED]}, "roles_out_of_order"),
        ({"messages": [ASKED, SYSTEM, ANSWERED]}, "roles_out_of_order"),
        (
            {"conversation": [{"input": "q", "output": "a"}, {"system": "s", "input": "q", "output": "a"}]},
            "roles_out_of_order",
        ),
        ({"messages": [ASKED, ANSWERED, ASKED]}, "roles_out_of_order"),
        ({"prompt": [ASKED, ANSWERED], "chosen": "a", "rejected": "b"}, "roles_out_of_order"),
        ({"prompt": [], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, "roles_out_of_order"),
        ({"prompt": "q", "chosen": "a", "rejected": "a\n"}, "chosen_equals_rejected"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {**ANSWERED, "content": "a "}]}, "chosen_equals_rejected"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, "chosen_equals_rejected"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, "empty_answer"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [SYSTEM, ASKED, ANSWERED]}, "no_shared_prompt"),
        ({"chosen": [], "rejected": []}, "no_shared_prompt"),
        ({"chosen": "a", "rejected": "b"}, "unknown_format"),
        ({"prompt": "q", "completion": " "}, "empty_answer"),
        ({"prompt": "q", "completion": None}, "unknown_format"),
        ({"prompt": "q", "completion": []}, "roles_out_of_order"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 2}]}, "bad_weight"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, "nothing_to_train"),
        ({"prompt": "q", "chosen": "a", "label": True}, "unknown_format"),
        (sharegpt(("human", "q"), ("function_call", "f(1)"), ("gpt", "a")), "bad_tool_call"),
        ({**DIALOGUE, "tools": "f"}, "bad_tools"),
        ({**DIALOGUE, "tools": [1]}, "bad_tools"),
    ],
)
def test_every_reason_to_drop(value: Any, code: str) -> None:
    with pytest.raises(Dropped) as caught:
        to_canonical(value)
    assert caught.value.code == code
    assert caught.value.reason


def test_white_space_around_an_answer_is_taken_off_and_told() -> None:
    found = to_canonical({"instruction": " q ", "output": "\n a \n"})
    assert found.trimmed
    assert found.row["messages"] == [{"role": "user", "content": " q "}, ANSWERED]


def test_a_named_format_wins_over_the_keys() -> None:
    both = {**DIALOGUE, "instruction": "other", "output": "a"}
    assert to_canonical(both).format == "openai"
    assert to_canonical(both, "alpaca").row["messages"][0]["content"] == "other"
    with pytest.raises(Dropped, match="it lacks `conversations` of sharegpt; its keys are messages"):
        to_canonical(DIALOGUE, "sharegpt")
