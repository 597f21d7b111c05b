"""Rows as people have them, whose meaning is easily lost or changed: read, or refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_templates import templates, tokenizer_of

from appliance.data.dropped import Dropped
from appliance.data.formats import Canonical, to_canonical
from appliance.data.render import render_conversation
from appliance.errors import InvalidInput

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
QWEN = (
    "Always answer in French.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + json.dumps(TOOL)
    + "\n</tools>"
    "\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML tags. "
    f"Here are the available tools: <tools> {json.dumps([TOOL])} </tools> For each function call return a json object."
)


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def s(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def read(value: Any) -> Canonical:
    return to_canonical(value)


def answer(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = read(value).row["messages"][-1]
    return found


def reason(value: Any) -> tuple[str, str]:
    with pytest.raises(Dropped) as dropped:
        to_canonical(value)
    return dropped.value.code, dropped.value.reason


@pytest.mark.parametrize(
    ("system", "left"),
    [
        (QWEN, "Always answer in French."),
        (HERMES, None),
        (f"Be nice. <tools>[{json.dumps(TOOL)}]</tools>", "Be nice."),
    ],
)
def test_tools_of_a_system_prompt_are_read_and_its_other_words_stay(system: str, left: str | None) -> None:
    found = read({"messages": [s(system), u("weather?"), a(CALL)]})
    assert found.row["tools"] == [TOOL]
    said = [message["content"] for message in found.row["messages"] if message["role"] == "system"]
    assert said == ([left] if left else [])
    assert found.row["messages"][-1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}


@pytest.mark.parametrize("flag", ["on", "off", "Disabled"])
def test_a_flag_is_no_thought(flag: str) -> None:
    for row in (
        {"system_prompt": "detailed thinking off", "input": [u("2+2?")], "output": "4", "reasoning": flag},
        {"instruction": "2+2?", "output": "4", "thinking": flag},
    ):
        found = read(row)
        assert "reasoning_content" not in found.row["messages"][-1]
        assert found.odd == ("thought_is_a_flag",)


@pytest.mark.parametrize("more", [{"rejected_response": "answer to q2"}, {"label": True}, {"kto_tag": False}])
def test_what_is_said_of_an_answer_that_is_not_there_judges_no_other(more: dict[str, Any]) -> None:
    code, why = reason({"messages": [u("q1"), a("a1"), u("q2")], **more})
    assert code == "roles_out_of_order"
    assert next(iter(more)) in why


@pytest.mark.parametrize(
    "text",
    [
        '[{"role":"user","content":"Hello"},{"role":"assistant","content":"Hi"}]',
        '{"role":"model","name":"Anna","text":"walks"}',
        '[{"from":"Paris","to":"Rome"}]',
        '[{"speaker":"A","text":"Hello"},{"speaker":"B","text":"Hi"}]',
    ],
)
def test_an_answer_that_is_json_stays_what_it_is(text: str) -> None:
    assert answer({"prompt": "Write it as JSON", "completion": text}) == a(text)


def test_an_answer_may_be_given_as_json_of_a_message() -> None:
    assert answer({"prompt": "Hello?", "completion": json.dumps([a("Hi")])}) == a("Hi")
    pair = {
        "prompt": "Hello?",
        "chosen": json.dumps([u("Hello?"), a("Hi")]),
        "rejected": json.dumps([u("Hello?"), a("No")]),
    }
    assert read(pair).row["chosen"] == [a("Hi")]


def test_what_was_said_beside_an_earlier_call_is_in_the_prompt_or_the_row_is_refused() -> None:
    call = [{"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    row = [
        u("askword"),
        a("letmelook", weight=0, tool_calls=call),
        {"role": "tool", "content": "7", "tool_call_id": "call00001"},
    ]
    rendered, refused = 0, 0
    for template in templates().values():
        tokenizer = tokenizer_of(template)
        try:
            (last,) = render_conversation(tokenizer, [*row, a("seven")], [TOOL])[-1:]
        except InvalidInput:
            refused += 1
            continue
        assert "letmelook" in tokenizer.decode(last.input_ids)
        rendered += 1
    assert rendered > 5
    assert refused > 5


def test_arguments_by_their_names_alone_become_a_schema() -> None:
    plain = {"name": "f", "description": "d", "parameters": {"x": {"description": "num", "type": "int", "default": ""}}}
    (tool,) = read({"query": "q", "answers": '[{"name":"f","arguments":{"x":1}}]', "tools": [plain]}).row["tools"]
    assert tool["parameters"] == {"type": "object", "properties": plain["parameters"]}
    (tool,) = read({"messages": [u("q"), a("a")], "tools": [{"type": "function", "function": plain}]}).row["tools"]
    assert tool["function"]["parameters"]["properties"] == plain["parameters"]
    for kept in ({"type": "object", "properties": {}}, {}, {"$ref": {}}):
        (tool,) = read({"messages": [u("q"), a("a")], "tools": [{"name": "f", "parameters": kept}]}).row["tools"]
        assert tool["parameters"] == kept


@pytest.mark.parametrize(
    ("parts", "thought", "unread"),
    [
        ([{"type": "thinking", "thinking": "hmm", "text": None, "value": None}], "hmm", ()),
        ([{"type": "thinking", "thinking": None}], None, ()),
        ([{"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "x"}]}], None, ("summary",)),
        ([{"type": "thinking", "thinking": "A", "text": "B"}], "A", ("text",)),
    ],
)
def test_a_typed_thought_is_what_it_holds(parts: list[Any], thought: str | None, unread: tuple[str, ...]) -> None:
    text = {"type": "text", "text": None, "value": "4"}
    found = read({"messages": [u("q"), {"role": "assistant", "content": [*parts, text]}]})
    said = found.row["messages"][-1]
    assert (said["content"], said.get("reasoning_content")) == ("4", thought)
    assert {name.rpartition(".")[2] for name in found.unread} >= set(unread)


def test_typed_parts_do_not_take_the_place_of_keys_in_silence() -> None:
    thinking = {
        "role": "assistant",
        "reasoning_content": "A",
        "content": [{"type": "thinking", "thinking": "B"}, {"type": "text", "text": "4"}],
    }
    assert "messages[].reasoning_content" in read({"messages": [u("q"), thinking]}).unread
    used = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    both = {"role": "assistant", "content": [used], "tool_calls": [{"name": "g", "arguments": {}}]}
    assert "messages[].tool_calls" in read({"messages": [u("q"), both]}).unread


@pytest.mark.parametrize(
    "text",
    [
        f"<think>maybe {CALL} hmm no</think>I can not.",
        f"This is how a call looks:\n```\n{CALL}\n```\nThat is all.",
        f"This is how a call looks:\n```\n{CALL}",
        f"Before. {CALL} After. {CALL} End",
        "<tool_call>\n<function=weather>\n</function>\n</tool_call>",
        'Let me see. <functioncall> {"name": "f", "arguments": "{}"}',
    ],
)
def test_calls_that_are_not_made_are_left_where_they_stand_and_told(text: str) -> None:
    found = read({"messages": [u("q"), a(text)]})
    assert "tool_calls" not in found.row["messages"][-1]
    assert found.row["messages"][-1]["content"] == text
    assert "call_in_text" in found.odd


def test_calls_at_the_end_are_made_after_what_is_said_and_thought() -> None:
    found = answer({"messages": [u("q"), a(f"<think>I need {CALL}</think>One moment.\n{CALL}\n{CALL}")]})
    assert found["content"] == f"<think>I need {CALL}</think>One moment."
    assert len(found["tool_calls"]) == 2
    listed = answer(
        {
            "messages": [
                u("q"),
                a('<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>'),
            ]
        }
    )
    assert [call["function"]["name"] for call in listed["tool_calls"]] == ["f", "g"]


def test_a_call_in_a_preference_is_told() -> None:
    assert read({"prompt": "q", "chosen": CALL, "rejected": "no"}).odd == ("call_in_text",)


def test_a_sentence_about_the_mark_of_thoughts_is_no_thought() -> None:
    text = "You close it with the </think> tag, then answer."
    assert answer({"messages": [u("q"), a(text)]}) == a(text)
    assert answer({"messages": [u("q"), a("because\n</think>\n\n4")]})["content"] == "<think>\nbecause\n</think>\n\n4"
    assert reason({"messages": [u("q"), a("<think> I see the <think> tag. Well I")]})[0] == "cut_thought"
    assert reason({"messages": [u("q"), a("<think>one</think>")]}) == (
        "empty_answer",
        "the assistant says nothing after its thought",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [u("q"), a("", tool_calls=[{"name": "f", "arguments": '{"a":1,"a":2}'}])]},
        {"messages": '[{"role":"user","content":"A","content":"B"},{"role":"assistant","content":"x"}]'},
        {"messages": [u("q"), a("x")], "tools": '[{"name":"f","description":"A","description":"B"}]'},
    ],
)
def test_a_key_that_stands_twice_in_json_within_a_text_is_refused(row: dict[str, Any]) -> None:
    assert reason(row)[0] == "repeated_key"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_arguments_hold_numbers(number: str) -> None:
    row = {"messages": [u("q"), a("", tool_calls=[{"name": "f", "arguments": f'{{"a":{number}}}'}])]}
    assert reason(row)[0] == "bad_tool_call"
    row = {"messages": [u("q"), a("", tool_calls=[{"name": "f", "arguments": {"a": float(number)}}])]}
    assert reason(row)[0] == "bad_tool_call"


def test_vertex_has_no_thought_alone_and_no_key_lost() -> None:
    thought = {"role": "model", "parts": [{"text": "hmm", "thought": True}]}
    said = {"role": "model", "parts": [{"text": "4"}]}
    asked = {"role": "user", "parts": [{"text": "q"}]}
    assert reason({"contents": [asked, thought, said]})[0] == "cut_thought"
    call = {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]}
    result = {"role": "user", "parts": [{"functionResponse": {"name": "f", "id": "7", "response": {"r": 1}}}]}
    tools = [{"functionDeclarations": [{"name": "f"}], "googleSearch": {"a": 1}}]
    found = read({"contents": [asked, call, result, said], "tools": tools})
    assert found.unread == ("tools[].googleSearch",)
    assert found.row["messages"][2]["tool_call_id"] == "7"
    plain = {"role": "model", "parts": [{"text": "4", "thought": False}]}
    assert read({"contents": [asked, plain]}).unread == ()
    assert reason({"contents": [{**call, "role": "user"}, said]})[0] == "bad_tool_call"


def test_whole_transcripts_beside_their_prompt_are_answers_to_it() -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    found = read({"prompt": prompt, "chosen": f"{prompt} Hello", "rejected": f"{prompt} No"}).row
    assert (found["prompt"], found["chosen"], found["rejected"]) == ([u("Hi")], [a("Hello")], [a("No")])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rejected", [u("Bye now"), a("Hi friend")], True),
        ("rejected", "Hi friend", True),
        ("system_message", "Hello there", True),
        ("loss_mask", "Hello there", True),
        ("prompt", "Hello there", False),
        ("question", [u("Hello there")], False),
        ("question", [a("Hello there")], True),
        ("output", "See you", False),
        ("output", "Bye now", True),
    ],
)
def test_only_what_says_the_same_again_needs_no_word(key: str, value: Any, told: bool) -> None:
    row = {"messages": [u("Hello there"), a("Hi friend"), u("Bye now"), a("See you")], key: value}
    assert (key in read(row).unread) is told


def test_a_text_under_another_name_counts_where_the_first_is_empty() -> None:
    found = read(
        {
            "messages": [
                {"role": "system", "content": "", "value": "Be nice"},
                u("q"),
                {
                    "role": "assistant",
                    "content": "",
                    "text": "Let me look",
                    "tool_calls": [{"name": "f", "arguments": ""}],
                },
                {"role": "tool", "content": "", "text": "42"},
                a("42"),
            ]
        }
    ).row["messages"]
    assert [message["content"] for message in found] == ["Be nice", "q", "Let me look", "42", "42"]
    assert found[2]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [u("q"), {"role": "assistant", "speaker": "Alice", "content": "x"}]}, "messages[].speaker"),
        (
            {
                "messages": [
                    u("q"),
                    {"role": "assistant", "content": [{"type": "text", "text": "x", "citations": ["y"]}]},
                ]
            },
            "messages[].content[].citations",
        ),
        (
            {"messages": [u("q"), a("", tool_calls=[{"name": "f", "arguments": {"a": 1}, "input": {"b": 2}}])]},
            "messages[].tool_calls[].input",
        ),
        (
            {"messages": [u("q"), a("x")], "tools": [{"description": "outer", "function": {"name": "f"}}]},
            "tools[].description",
        ),
    ],
)
def test_what_is_beside_what_is_read_is_told(row: dict[str, Any], told: str) -> None:
    assert told in read(row).unread


def test_ids_of_calls_may_be_numbers_or_stand_within() -> None:
    for call in ({"id": 7, "name": "f", "arguments": {}}, {"function": {"id": "7", "name": "f", "arguments": {}}}):
        assert answer({"messages": [u("q"), a("", tool_calls=[call])]})["tool_calls"][0]["id"] == "7"


@pytest.mark.parametrize("label", ["True", "false", True])
def test_a_judgement_of_an_instructed_answer_is_one(label: Any) -> None:
    found = read({"instruction": "q", "output": "x", "label": label})
    assert found.format == "unpaired"
    assert found.row["label"] is (str(label).lower() == "true")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}], "label": 0},
        {"prompt": "q", "chosen": "x", "rejected": "y", "label": False},
    ],
)
def test_a_judgement_that_judges_nothing_is_an_error(row: dict[str, Any]) -> None:
    assert "judgement_not_used" in read(row).odd


def test_good_rows_are_read() -> None:
    assert answer({"instruction": "Say hi", "output": None, "response": "Hi"}) == a("Hi")
    empty = a("<think>\n\n</think>\n\n42", reasoning_content="because")
    assert answer({"messages": [u("q"), empty]}) == a("42", reasoning_content="because")
    assert read({"messages": [u("q"), a("x")], "tools": [json.dumps(TOOL)]}).row["tools"] == [TOOL]


def test_a_part_that_holds_a_call_and_its_result_is_refused_for_that() -> None:
    call = {"id": "c", "name": "f", "args": "{}"}
    part = {"type": "tool_call", "tool_call": {**call, "output": "7"}}
    assert reason({"messages": [u("q"), {"role": "assistant", "content": [part]}]})[0] == "call_with_result"
    part = {"type": "tool_call", "tool_call": call}
    assert answer({"messages": [u("q"), {"role": "assistant", "content": [part]}]})["tool_calls"][0]["id"] == "c"


def test_folds_that_stay_in_a_text_are_told() -> None:
    text = 'Well.\n<details type="tool_calls" done="true">\n<summary>x</summary>\n</details>\nDone.'
    assert read({"messages": [u("q"), a(text)]}).odd == ("thought_in_other_marks",)


def test_an_empty_list_of_parts_beside_calls_is_no_fault() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    found = read({"messages": [u("q"), {"role": "assistant", "content": [], "tool_calls": [call]}]})
    assert found.unread == ()
    assert found.row["messages"][-1]["tool_calls"][0]["function"]["name"] == "f"


def test_a_thought_or_a_text_that_says_what_stands_beside_it_is_looked_for_by_itself() -> None:
    thinking = [u("askword"), a("Paris is it", reasoning_content="Paris")]
    call = [{"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"place": "Rome"}}}]
    for name in ("qwen2_5", "llama3", "gemma3"):
        with pytest.raises(InvalidInput, match="leaves out the reasoning"):
            render_conversation(tokenizer_of(templates()[name]), thinking)
    with pytest.raises(InvalidInput):
        render_conversation(tokenizer_of(templates()["llama3_1"]), [u("askword"), a("Rome", tool_calls=call)], [TOOL])
    (found,) = render_conversation(tokenizer_of(templates()["qwen3"]), thinking)
    assert tokenizer_of(templates()["qwen3"]).decode(found.input_ids).count("Paris") == 2


def test_an_argument_that_a_template_leaves_out_of_a_tool_is_noticed() -> None:
    inner = {"type": "object", "properties": {"deepname": {"type": "string"}}}
    schema = {"type": "object", "properties": {"place": inner}}
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": schema}}
    template = templates()["qwen3"]
    assert render_conversation(tokenizer_of(template), [u("q"), a("x")], [tool])
    shallow = template.replace("tool | tojson", "{'name': tool.function.name, 'arguments': ['place']} | tojson")
    assert shallow != template
    with pytest.raises(InvalidInput, match="deepname"):
        render_conversation(tokenizer_of(shallow), [u("q"), a("x")], [tool])


def test_quotes_within_a_folded_thought_stay() -> None:
    lines = "<summary>x</summary>\n> &gt;&gt;&gt; print(1)\n> > quoted"
    fold = f'<details type="reasoning" done="true">\n{lines}\n</details>\n4'
    said = answer({"messages": [u("q"), a(fold)]})["content"]
    assert ">>> print(1)\n> quoted" in said


def test_all_tools_of_a_system_prompt_are_read() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    system = "".join(f"<tools>{json.dumps([tool])}</tools>" for tool in (TOOL, other))
    assert read({"messages": [s(system), u("q"), a(CALL)]}).row["tools"] == [TOOL, other]


def test_a_second_call_or_id_of_a_call_is_told() -> None:
    turn = {"role": "function_call", "content": '{"name": "f", "arguments": {}}', "tool_calls": [{"name": "g"}]}
    assert "messages[].tool_calls" in read({"messages": [u("q"), turn]}).unread
    call = {"id": "A", "tool_call_id": "B", "name": "f", "arguments": {}}
    found = read({"messages": [u("q"), a("", tool_calls=[call])]})
    assert found.unread == ("messages[].tool_calls[].tool_call_id",)
