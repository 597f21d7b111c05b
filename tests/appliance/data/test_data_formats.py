from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_exports import CHAT, LIBRE, TRANSCRIPT, TYPED, VERTEX

from appliance.data.dropped import Dropped
from appliance.data.fields import MEANING
from appliance.data.formats import FORMATS, to_canonical

ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
DIALOGUE = {"messages": [ASKED, ANSWERED]}
OTHER = {"role": "assistant", "content": "b"}
JUDGED = {"prompt": [ASKED], "completion": [ANSWERED]}
WITH_INPUT = {"role": "user", "content": "q\n\ni"}
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
                    {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "1"}]},
                    {"role": "tool", "content": "o", "tool_call_id": "1"},
                    ANSWERED,
                ]
            },
        ),
        ({**DIALOGUE, "system": "s"}, "openai", {"messages": [SYSTEM, ASKED, ANSWERED]}),
        ({"messages": [SYSTEM, ASKED, ANSWERED], "system": "s "}, "openai", {"messages": [SYSTEM, ASKED, ANSWERED]}),
        (sharegpt(("human", "q"), ("gpt", "a"), kto_tag=False), "unpaired", {**JUDGED, "label": False}),
        ({"instruction": "q", "output": "a", "kto_tag": "true"}, "unpaired", {**JUDGED, "label": True}),
        ({"prompt": "q", "completion": "a", "label": -1}, "unpaired", {**JUDGED, "label": False}),
        ({"instruction": "q", "output": "a", "label": 1}, "alpaca", DIALOGUE),
        ({**DIALOGUE, "rejected_response": "b"}, "preference", PAIR),
        ({**DIALOGUE, "rejected_messages": [ASKED, OTHER]}, "preference", PAIR),
        ({"chosen_messages": [ASKED, ANSWERED], "rejected_messages": [ASKED, OTHER]}, "preference", PAIR),
        (
            {
                "input": {"messages": [ASKED], "tools": [{"name": "f"}]},
                "preferred_output": [ANSWERED],
                "non_preferred_output": [OTHER],
            },
            "preference",
            {**PAIR, "tools": [{"name": "f"}]},
        ),
        ({"question": "q", "chosen": "a", "rejected": "b", "system": ""}, "preference", PAIR),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "preference", PAIR),
        ({"instruction": "q", "context": "i", "response": "a"}, "alpaca", {"messages": [WITH_INPUT, ANSWERED]}),
        (
            {"question": "q", "response": "a", "system_prompt": "s"},
            "completion",
            {"messages": [SYSTEM, ASKED, ANSWERED]},
        ),
        ({"conversation": [ASKED, ANSWERED]}, "turns", DIALOGUE),
        ({**DIALOGUE, "conversations": None, "chosen": None, "rejected": None}, "openai", DIALOGUE),
        (
            {"messages": [ASKED, {**OTHER, "loss_weight": 0.0}, ASKED, {**ANSWERED, "loss": True}]},
            "openai",
            {"messages": [ASKED, {**OTHER, "weight": 0}, ASKED, ANSWERED]},
        ),
        (
            {"messages": [{**ASKED, "loss": None}, {**ANSWERED, "reasoning": "r"}]},
            "openai",
            {"messages": [ASKED, {**ANSWERED, "reasoning_content": "r"}]},
        ),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "tool_call", "content": '{"name": "f", "arguments": "\\"{\\\\\\"x\\\\\\": 1}\\""}'},
                    {"role": "tool_response", "content": "o"},
                    ANSWERED,
                ]
            },
            "openai",
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "o"},
                    ANSWERED,
                ]
            },
        ),
        ({**PAIR, "prompt": "[{'role': 'user', 'content': 'q'}]"}, "preference", PAIR),
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
            {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, OTHER], "system": "s"},
            "preference",
            {**PAIR, "prompt": [SYSTEM, ASKED]},
        ),
        ({"prompt": "q", "completion": "a"}, "completion", DIALOGUE),
        (
            {"system": "s", "query": "q", "response": "b", "history": [["q", "a"]]},
            "pair",
            {"messages": [SYSTEM, ASKED, ANSWERED, ASKED, OTHER]},
        ),
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
        ({"messages": [SYSTEM]}, "roles_out_of_order"),
        ({"instruction": 1, "output": "a"}, "not_text"),
        ({"instruction": "q", "output": {"a": 1}}, "not_text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]}, "not_text"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "bad_history"),
        ({"messages": [{"role": "narrator", "content": "q"}, ANSWERED]}, "bad_role"),
        ({"messages": [{"role": 7, "content": "q"}, ANSWERED]}, "bad_role"),
        ({"messages": [{"content": "q"}, ANSWERED]}, "bad_role"),
        ({"messages": [ANSWERED]}, "roles_out_of_order"),
        ({"prompt": [ASKED, ANSWERED], "chosen": "a", "rejected": "b"}, "roles_out_of_order"),
        ({"prompt": [], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, "roles_out_of_order"),
        ({"prompt": "q", "chosen": "a", "rejected": "a\n"}, "chosen_equals_rejected"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {**ANSWERED, "content": "a "}]}, "chosen_equals_rejected"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, "chosen_equals_rejected"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, "empty_answer"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [SYSTEM, ASKED, ANSWERED]}, "no_shared_prompt"),
        ({"chosen": [], "rejected": []}, "no_shared_prompt"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED, ASKED, OTHER]}, "several_turns"),
        ({"messages": [ASKED, {"role": "tool", "content": "o"}, ANSWERED]}, "roles_out_of_order"),
        ({"messages": [{**ASKED, "content": " "}, ANSWERED]}, "empty_prompt"),
        ({"messages": [ASKED, {**ANSWERED, "content": ""}, ASKED, ANSWERED]}, "empty_answer"),
        ({"chosen": "a", "rejected": "b"}, "unknown_format"),
        ({"prompt": "q", "completion": " "}, "empty_answer"),
        ({"prompt": "q", "completion": None}, "empty_answer"),
        ({"prompt": "q", "completion": []}, "roles_out_of_order"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 2}]}, "bad_weight"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, "nothing_to_train"),
        ({"prompt": "q", "chosen": "a", "label": True}, "unknown_format"),
        (sharegpt(("human", "q"), ("function_call", "f(1)"), ("gpt", "a")), "bad_tool_call"),
        ({**DIALOGUE, "tools": "f"}, "bad_tools"),
        ({**DIALOGUE, "images": ["a.jpg"]}, "not_text"),
        ({**DIALOGUE, "split": "test"}, "other_split"),
        ({**DIALOGUE, "weight": 0}, "weight_0"),
        ({**DIALOGUE, "weight": 0.5}, "bad_weight"),
        ({"messages": [{**ASKED, "train": True}, ANSWERED]}, "bad_weight"),
        ({"messages": [SYSTEM, ASKED, ANSWERED], "system": "other"}, "two_system_messages"),
        ({"prompt": "q", "chosen": "[{'role': 'user'}\n {'role': 'assistant'}]", "rejected": "b"}, "unreadable_list"),
        ({**DIALOGUE, "tools": [1]}, "bad_tools"),
    ],
)
def test_every_reason_to_drop(value: Any, code: str) -> None:
    with pytest.raises(Dropped) as caught:
        to_canonical(value)
    assert caught.value.code == code
    assert caught.value.reason


UNTRAINED = {**ANSWERED, "weight": 0}


@pytest.mark.parametrize(
    ("messages", "kept", "odd"),
    [
        ([ASKED, ASKED, ANSWERED], [ASKED, ASKED, ANSWERED], ["consecutive"]),
        ([ASKED, ANSWERED, OTHER], [ASKED, ANSWERED, OTHER], ["consecutive"]),
        ([SYSTEM, SYSTEM, ASKED, ANSWERED], [SYSTEM, SYSTEM, ASKED, ANSWERED], ["consecutive"]),
        ([ASKED, SYSTEM, ANSWERED], [ASKED, SYSTEM, ANSWERED], ["later_system"]),
        ([ANSWERED, ASKED, OTHER], [UNTRAINED, ASKED, OTHER], ["greeting"]),
        ([SYSTEM, ANSWERED, ASKED, OTHER], [SYSTEM, UNTRAINED, ASKED, OTHER], ["greeting"]),
        ([ASKED, ANSWERED, ASKED, SYSTEM], [ASKED, ANSWERED], ["unanswered"]),
        ([ASKED, ANSWERED, ASKED, OTHER], [ASKED, ANSWERED, ASKED, OTHER], []),
    ],
)
def test_turns_are_kept_as_they_come_and_what_is_odd_is_told(messages: Any, kept: Any, odd: list[str]) -> None:
    found = to_canonical({"messages": messages})
    assert found.row == {"messages": kept}
    assert list(found.odd) == odd


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


@pytest.mark.parametrize(
    ("value", "unread"),
    [
        ({**DIALOGUE, "images": [], "id": 7, "context": "c"}, {"id", "context"}),
        ({**DIALOGUE, "id": None, "context": ""}, set()),
        ({**DIALOGUE, "split": "train"}, set()),
        ({**DIALOGUE, "split": "third"}, {"split"}),
        ({**DIALOGUE, "label": "greeting"}, {"label"}),
        ({**DIALOGUE, "kto_tag": "perhaps"}, {"kto_tag"}),
        ({**DIALOGUE, "prompt": "q", "chosen": "a"}, {"prompt", "chosen"}),
        ({"messages": [{**ASKED, "mask": 1}, {**ANSWERED, "mask": 0, "mood": ""}]}, {"messages[].mask"}),
        ({"conversation": [{"input": "q", "output": "a", "score": 3}]}, {"conversation[].score"}),
        (
            {"input": {"messages": [ASKED], "seed": 7}, "preferred_output": "a", "non_preferred_output": "b"},
            {"input.seed"},
        ),
    ],
)
def test_a_key_that_says_something_and_is_not_read_is_told(value: dict[str, Any], unread: set[str]) -> None:
    found = to_canonical(value).unread
    assert set(found) == unread
    assert len(found) == len(unread)
    assert to_canonical(value, ignored=frozenset(unread)).unread == (), "as the finding names them"
    ignored = frozenset(key.rpartition(".")[2] for key in unread)
    assert to_canonical(value, ignored=ignored).unread == ()


def test_what_is_ignored_is_as_if_it_were_not_there() -> None:
    value = {"messages": [{**ASKED, "train": True}, ANSWERED], "images": ["a.jpg"], "split": "test", "label": True}
    found = to_canonical(value, ignored=frozenset({"train", "images", "split", "label"}))
    assert (found.row, found.unread) == (DIALOGUE, ())


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("nan", ("no_value",)),
        ("None of them", ()),
        ("I am {{ name }}.", ("placeholder",)),
        ("f'{{x: {y}}}'", ()),
        ("<|im_start|>user\nhello", ("rendered",)),
        ("a < b [/I]", ()),
    ],
)
def test_texts_that_are_hardly_meant_are_told(text: str, odd: tuple[str, ...]) -> None:
    assert to_canonical({"instruction": "q", "output": text}).odd == odd


SHAPED: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "sharegpt": (sharegpt(("human", "q"), ("gpt", "a")), ("conversations", -1), "messages[]"),
    "sharegpt pair": (
        {**sharegpt(("human", "q")), "chosen": "a", "rejected": "b"},
        ("conversations", -1),
        "messages[]",
    ),
    "pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, (), ""),
    "instructed pair": ({"instruction": "q", "chosen": "a", "rejected": "b"}, (), ""),
    "second answer": ({**DIALOGUE, "rejected_response": "b"}, ("messages", -1), "messages[]"),
    "second chat": ({**DIALOGUE, "rejected_messages": [ASKED, OTHER]}, ("rejected_messages", -1), "messages[]"),
    "preferred": (
        {"input": {"messages": [ASKED]}, "preferred_output": [ANSWERED], "non_preferred_output": [OTHER]},
        ("input",),
        "input",
    ),
    "openai": (DIALOGUE, ("messages", -1), "messages[]"),
    "turns": ({"conversation": [{"input": "q", "output": "a"}]}, ("conversation", -1), "conversation[]"),
    "vertex": (VERTEX, ("contents", -1), "contents[]"),
    "transcript": (TRANSCRIPT, (), ""),
    "chat": (CHAT, ("chat",), "chat"),
    "one chat": (LIBRE, ("messages", -1), "messages[]"),
    "typed parts": (TYPED, ("messages", -1), "messages[]"),
    "calls": ({"query": "q", "answers": [{"name": "f", "arguments": {}}]}, (), ""),
    "alpaca": ({"instruction": "q", "output": "a"}, (), ""),
    "dolly": ({"instruction": "q", "response": "a"}, (), ""),
    "completion": ({"prompt": "q", "completion": "a"}, (), ""),
    "input and output": ({"input": "q", "output": "a"}, (), ""),
    "judged": ({"prompt": "q", "completion": "a", "label": True}, (), ""),
    "around": ({"data": {"prompt": "q", "completion": "a"}}, ("data",), ""),
}
"""An example of every shape, a place in it that has keys of its own, and how these are told."""
WORDS = st.text("abcdefghij_", min_size=1, max_size=8).map(lambda word: f"x{word}")
SPRINKLED = st.dictionaries(st.sampled_from(sorted(MEANING)) | WORDS, st.sampled_from([float, str, list, dict])).map(
    lambda kinds: {key: SPRINKLE[kind](key) for key, kind in kinds.items()}
)
SPRINKLE: dict[type, Any] = {
    float: lambda key: 0.5 + len(key) / 100,
    str: lambda key: f"zebra {key}",
    list: lambda key: [f"zebra {key}"],
    dict: lambda key: {"zebra": key},
}
"""A value of each kind, another one for every key."""


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def test_every_shape_has_an_example() -> None:
    assert {to_canonical(value).format for value, _, _ in SHAPED.values()} == set(FORMATS)


@settings(max_examples=600)
@given(st.sampled_from(sorted(SHAPED)), SPRINKLED, SPRINKLED)
def test_no_key_is_lost_in_silence(shape: str, in_row: dict[str, Any], inside: dict[str, Any]) -> None:
    """Each key that is sprinkled in changes the row, or is told, or is the reason why there is none."""
    example, path, prefix = SHAPED[shape]
    value = {**in_row, **copy.deepcopy(example)}
    added: list[tuple[tuple[Any, ...], str, str]] = [((), key, key) for key in in_row.keys() - example.keys()]
    if path:
        held = at(value, path)
        new = inside.keys() - held.keys()
        held |= {key: inside[key] for key in new}
        added += [(path, key, f"{prefix}.{key}".lstrip(".")) for key in new]
    try:
        found = to_canonical(value)
    except Dropped:  # whose reason the report has
        return
    for place, key, told in added:
        without = copy.deepcopy(value)
        del at(without, place)[key]
        try:
            same = to_canonical(without).row == found.row
        except Dropped:
            continue
        assert {told, *place[:1]} & set(found.unread) or not same, (place, key)


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "q", "output": "[{'role': 'assistant', 'content': 'a'}]"},
        {"prompt": "q", "chosen": "{'role': 'assistant', 'content': 'a'}", "rejected": "b"},
        {"messages": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]"},
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
        {"conversation": [{"speaker": "user", "text": "q"}, {"speaker": " AI ", "text": "a"}]},
    ],
)
def test_messages_in_whatever_a_table_makes_of_them_are_read(value: dict[str, Any]) -> None:
    row = to_canonical(value).row
    asked, answered = (row["prompt"], row["chosen"]) if "chosen" in row else (row["messages"][:1], row["messages"][1:])
    assert [asked, answered] == [[{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]]


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "q", "output": "a", "label": False},
        {"prompt": "q", "completion": "a", "label": 0.0},
        {"prompt": "q", "completion": "a", "label": "undesirable"},
        {"prompt": "q", "completion": "a", "desirable": False},
    ],
)
def test_a_judgement_is_read_by_whatever_it_is_called(value: dict[str, Any]) -> None:
    assert to_canonical(value).row["label"] is False


def test_weights_may_be_texts() -> None:
    assert to_canonical({"prompt": "q", "completion": "a", "weight": "1.0"}).row
    with pytest.raises(Dropped) as caught:
        to_canonical({"prompt": "q", "completion": "a", "weight": "0"})
    assert caught.value.code == "weight_0"


def test_keys_that_say_again_what_was_read_are_no_loss() -> None:
    asked, answered = {"role": "user", "content": "What now?"}, {"role": "assistant", "content": "Wait."}
    assert to_canonical({"prompt": "What now?", "messages": [asked, answered]}).unread == ()
    assert to_canonical({"prompt": "Other.", "messages": [asked, answered]}).unread == ("prompt",)
    both = {"chosen": [asked, answered], "rejected": [asked, {**answered, "content": "Run."}]}
    row = {"prompt": "What now?", "messages": [asked, answered], **both}
    assert to_canonical(row).unread == ()


def test_a_dialogue_as_a_prompt_is_turns() -> None:
    asked = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"
    row = to_canonical({"prompt": asked, "chosen": "Four.", "rejected": "Five."}).row
    assert [message["content"] for message in row["prompt"]] == ["One?", "Two.", "Three?"]
    belle = {"instruction": "Human:One?\nAssistant:Two.\nHuman:Three?\nAssistant:", "input": "", "output": "Four."}
    assert [message["content"] for message in to_canonical(belle).row["messages"]] == [
        "One?",
        "Two.",
        "Three?",
        "Four.",
    ]
    plain = {"instruction": "Write a play:\nHuman: Hi.\nAssistant: Ho.", "output": "Done."}
    assert len(to_canonical(plain).row["messages"]) == 2


def test_the_branch_that_goes_on_is_read() -> None:
    def said(id: str, parent: str, text: str, user: bool) -> dict[str, Any]:
        return {"messageId": id, "parentMessageId": parent, "text": text, "isCreatedByUser": user}

    given = [said("1", "0", "Q", True), said("2", "1", "A", False), said("3", "0", "Other?", True)]
    given.append(said("4", "3", "B", False))
    found = to_canonical({"messages": given})
    assert [message["content"] for message in found.row["messages"]] == ["Other?", "B"]
    assert "other_branches" in found.odd
    nested = [{**given[2], "children": [{**given[3], "children": []}]}]
    assert to_canonical({"messages": nested}).row == found.row


def test_weights_of_parts_are_told() -> None:
    part = {"type": "text", "text": "a", "loss_weight": 0}
    found = to_canonical({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [part]}]})
    assert found.unread == ("messages[].content[].loss_weight",)


def test_two_system_prompts_are_not_one() -> None:
    row = {"system": "One.", "system_prompt": "Two.", "instruction": "q", "output": "a"}
    with pytest.raises(Dropped) as caught:
        to_canonical(row)
    assert caught.value.code == "two_system_messages"
    del row["system"]
    assert to_canonical(row).row["messages"][0] == {"role": "system", "content": "Two."}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"contents": [{"parts": [{"functionCall": "f"}]}]}, "bad_tool_call"),
        ({"contents": [{"parts": [{"functionResponse": "f"}]}]}, "bad_tool_call"),
        ({"contents": [{"parts": [{"text": "q"}]}], "tools": [{"functionDeclarations": 5}]}, "bad_tools"),
        ({"contents": [{"parts": [{"text": "q"}]}], "tools": ["f"]}, "bad_tools"),
        ({"chat": {"history": {"messages": {}, "currentId": []}}}, "empty_prompt"),
        ({"contents": [], "systemInstruction": "One.", "system_instruction": "Two."}, "two_system_messages"),
        ({"prompt": "q", "chosen": [{**ANSWERED, "weight": 0}], "rejected": "b"}, "nothing_to_train"),
        ({"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "weight": 0}], "kto_tag": True}, "nothing_to_train"),
        ({"messages": [ASKED, ANSWERED], "output": "a", "kto_tag": 7, "label": None}, None),
        ({"data": {"prompt": "q", "completion": "a"}}, None),
        ({"prompt": "q", "completion": "a", "image": {"bytes": {"bytes": 7}}}, "not_text"),
    ],
)
def test_what_hardly_anybody_writes_is_read_or_dropped_with_a_reason(value: dict[str, Any], code: str | None) -> None:
    if code is None:
        assert to_canonical(value).row
    else:
        with pytest.raises(Dropped) as caught:
            to_canonical(value)
        assert caught.value.code == code


@pytest.mark.parametrize("told", ["Be brief.", {"text": "Be brief."}, {"parts": [{"text": "Be brief."}]}])
def test_a_system_instruction_may_be_a_text(told: Any) -> None:
    turns = [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]
    row = to_canonical({"contents": turns, "systemInstruction": told}).row
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}


def test_what_is_ignored_within_a_row_that_a_program_exports_is_ignored() -> None:
    inside = {"prompt": "q", "completion": "a", "label": 0}
    assert to_canonical({"row": inside}).format == "unpaired"
    found = to_canonical({"row": inside}, ignored=frozenset({"label"}))
    assert (found.format, found.unread) == ("completion", ())
    assert to_canonical({"row": inside}, "completion").format == "unpaired"


def test_a_prompt_is_found_again_in_an_answer_without_its_system_message() -> None:
    value = {"system": "Be brief.", "prompt": "q", "chosen": [ASKED, ANSWERED], "rejected": "b"}
    row = to_canonical(value).row
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["chosen"] == [ANSWERED]


def test_a_label_that_is_a_number_is_told_and_one_that_is_none_is_named() -> None:
    assert to_canonical({**DIALOGUE, "label": 1}).odd == ("label_of_numbers",)
    assert to_canonical({**DIALOGUE, "label": True}).odd == ()
    with pytest.raises(Dropped, match="`kto_tag` is 'perhaps'"):
        to_canonical({**DIALOGUE, "kto_tag": "perhaps"}, "unpaired")
