"""Every field is obeyed, or changes nothing, or is refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.wire.errors import ChatError
from serve.wire.fields import admit

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
HONOURS = frozenset(
    {"model", "messages", "stream", "stream_options", "temperature", "max_tokens", "n", "stop", "top_p"}
)


def refused(**fields: Any) -> ChatError:
    with pytest.raises(ChatError) as caught:
        admit({**ASK, **fields}, HONOURS)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "live"},
        {"temperature": 0},
        {"temperature": 2.0},
        {"max_tokens": 1},
        {"n": 128},
        {"stop": "x"},
        {"stop": ["a", "b", "c", "d"]},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {}},
        {"top_p": 1},
    ],
)
def test_what_the_engine_honours_is_passed_on(fields: dict[str, Any]) -> None:
    assert admit({**ASK, **fields}, HONOURS) == {**ASK, **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": None, "logprobs": None, "tools": None},
        {"logprobs": False, "top_logprobs": 0},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tool_choice": "none", "functions": [], "function_call": "none"},
        {"user": "u1", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"store": False, "service_tier": "auto"},
    ],
)
def test_what_changes_nothing_is_left_out(fields: dict[str, Any]) -> None:
    assert admit({**ASK, **fields}, HONOURS) == ASK


def test_a_neutral_value_of_an_honoured_field_is_passed_on() -> None:
    assert admit({**ASK, "n": 1, "stream": False}, HONOURS) == {**ASK, "n": 1, "stream": False}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", True),
        ("top_logprobs", 5),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("logit_bias", {"50256": -100}),
        ("seed", 1),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("store", True),
        ("service_tier", "priority"),
        ("reasoning_effort", "low"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("top_k", 0),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(name: str, value: Any) -> None:
    error = refused(**{name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert f"'{name}'" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("n", 0),
        ("n", 129),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 5),
        ("stop", 3),
        ("stream", 1),
        ("stream", "true"),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", {"continuous_usage_stats": True}),
        ("model", 5),
        ("messages", []),
        ("messages", "Hi"),
        ("logprobs", "yes"),
        ("seed", 1 << 63),
    ],
)
def test_what_is_of_the_wrong_kind(name: str, value: Any) -> None:
    error = refused(**{name: value})
    assert (error.param, error.code) == (name, "invalid_value")


def test_an_unknown_field_with_a_near_name() -> None:
    error = refused(temprature=1)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    assert "did you mean 'temperature'?" in error.message
    assert "did you mean" not in refused(zzzzzz=1).message


def test_fields_that_need_another() -> None:
    assert refused(stream_options={"include_usage": True}).param == "stream_options"
    with pytest.raises(ChatError) as caught:
        admit({**ASK, "top_logprobs": 2}, HONOURS | {"logprobs", "top_logprobs"})
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize("messages", [{}, {"messages": None}])
def test_messages_must_be_there(messages: dict[str, Any]) -> None:
    with pytest.raises(ChatError) as caught:
        admit(messages, HONOURS)
    assert (caught.value.param, caught.value.code) == ("messages", "missing_parameter")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("Hi", "messages[0]"),
        ({"content": "Hi"}, "messages[0].role"),
        ({"role": "bot", "content": "Hi"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]},
            "messages[0].content[0]",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["Hi"]}, "messages[0].content[0]"),
    ],
)
def test_a_message_that_cannot_be_read(message: Any, param: str) -> None:
    assert refused(messages=[message]).param == param


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user", "content": "Hi", "junk": 1}, "messages[0].junk", "unknown_parameter"),
        ({"role": "user", "content": "Hi", "x" * 5000: 1}, f"messages[0].{'x' * 64}…", "unknown_parameter"),
        ({"role": "user", "content": "Hi", "nmae": "a"}, "messages[0].nmae", "unknown_parameter"),
        ({"role": "user", "content": "Hi", "tool_calls": [{}]}, "messages[0].tool_calls", "unsupported_parameter"),
        ({"role": "user", "content": "Hi", "tool_call_id": "1"}, "messages[0].tool_call_id", "unsupported_parameter"),
        ({"role": "user", "content": "Hi", "reasoning": "x"}, "messages[0].reasoning", "unsupported_parameter"),
        ({"role": "assistant", "content": "Hi", "tool_calls": "f()"}, "messages[0].tool_calls", "invalid_value"),
        ({"role": "assistant", "content": "Hi", "refusal": "No."}, "messages[0].refusal", "invalid_value"),
        ({"role": "assistant", "content": "Hi", "audio": {"id": "a"}}, "messages[0].audio", "invalid_value"),
        ({"role": "user", "content": "Hi", "name": 5}, "messages[0].name", "invalid_value"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            "messages[0].content[0].cache_control",
            "unknown_parameter",
        ),
    ],
)
def test_what_a_message_may_not_say_is_refused_by_name(message: Any, param: str, code: str) -> None:
    error = refused(messages=[message])
    assert (error.param, error.code) == (param, code)
    assert f"'{param}'" in error.message
    assert ("did you mean 'name'?" in error.message) is ("nmae" in message)


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    nothing = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    said = {"role": "assistant", "content": "Hi", **nothing}
    assert admit({"messages": [said]}, HONOURS)["messages"] == [{"role": "assistant", "content": "Hi"}]


def test_messages_come_to_one_form() -> None:
    said = [
        {"role": "developer", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    assert admit({"messages": said}, HONOURS)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


def test_the_request_is_left_as_it_was() -> None:
    request = {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}], "user": "u"}
    before = repr(request)
    admit(request, HONOURS)
    assert repr(request) == before


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "model", "stream", "stream_options", "stop", "n", "tools", "top_k", "logit_bias"])
        | st.text(max_size=6),
        _JSON,
        max_size=5,
    )
)
def test_whatever_comes_is_admitted_or_refused(request: dict[str, Any]) -> None:
    with contextlib.suppress(ChatError):
        assert set(admit(request, HONOURS)) <= HONOURS
