"""What a chat completion request may say. A field is obeyed, or changes nothing, or is refused by name.

Pure: no I/O, and no knowledge of any engine but the names of the fields that it honours.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from appliance.data.tokenizer import TOLD_BY_ALL
from serve.wire.errors import MOST_SHOWN, ChatError, shown

MODEL_ALIAS = "live"
"""The model name that always means the live release."""

_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class _Field:
    """One field: what it must be, and when leaving it out changes nothing. `roles`: of a message, in which of them."""

    expects: str
    valid: Callable[[Any], bool]
    neutral: Callable[[Any], bool] = lambda value: False
    roles: tuple[str, ...] = _ROLES


def admit(request: dict[str, Any], honours: Set[str]) -> dict[str, Any]:
    """The request as an engine that obeys the fields in `honours` gets it.

    Fields that change nothing are left out, and messages are brought to one form. Raises ChatError naming the field
    that is unknown, is of the wrong kind, or would be ignored.
    """
    admitted: dict[str, Any] = {}
    for name, value in request.items():
        field = _FIELDS.get(name)
        if field is None:
            raise unknown(name, _FIELDS)
        if value is None:
            continue
        if not field.valid(value):
            raise ChatError(400, f"'{name}' must be {field.expects}", code="invalid_value", param=name)
        if name in honours:
            admitted[name] = value
        elif not field.neutral(value):
            raise ChatError(
                400, f"'{name}' is not supported here; leave it out", code="unsupported_parameter", param=name
            )
    if "messages" not in admitted:
        raise ChatError(400, "'messages' is missing", code="missing_parameter", param="messages")
    if "stream_options" in admitted and not admitted.get("stream"):
        raise ChatError(400, "'stream_options' needs 'stream' to be true", code="invalid_value", param="stream_options")
    if admitted.get("top_logprobs") and not admitted.get("logprobs"):
        raise ChatError(400, "'top_logprobs' needs 'logprobs' to be true", code="invalid_value", param="top_logprobs")
    admitted["messages"] = [_message(index, each) for index, each in enumerate(admitted["messages"])]
    return admitted


def unknown(name: str, known: Iterable[str], within: str = "") -> ChatError:
    """The refusal of a key that is none of those `known` in the object `within`."""
    where = f"{within}.{shown(name)}" if within else shown(name)
    close = difflib.get_close_matches(name, known, n=1) if len(name) <= MOST_SHOWN else []
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return ChatError(400, f"unknown parameter '{where}'{hint}", code="unknown_parameter", param=where)


def _message(index: int, message: Any) -> dict[str, Any]:
    """A message with its text in one string and without empty keys. Raises ChatError."""
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ChatError(400, f"'{where}' must be an object", code="invalid_value", param=where)
    role = message.get("role")
    if role not in _ROLES:
        raise ChatError(
            400, f"'{where}.role' must be one of {', '.join(_ROLES)}", code="invalid_value", param=f"{where}.role"
        )
    said: dict[str, Any] = {}
    for name, value in message.items():
        key = _MESSAGE_KEYS.get(name)
        if key is None:
            raise unknown(name, _MESSAGE_KEYS, where)
        if value is None or key.neutral(value):
            continue
        if not key.valid(value):
            raise ChatError(
                400, f"'{where}.{name}' must be {key.expects}", code="invalid_value", param=f"{where}.{name}"
            )
        if role not in key.roles:
            raise ChatError(
                400,
                f"'{where}.{name}' is not supported in a message of the role '{role}'; leave it out",
                code="unsupported_parameter",
                param=f"{where}.{name}",
            )
        said[name] = value
    if role == "developer":
        said["role"] = "system"
    if "reasoning_content" in said:
        said["reasoning"] = said.pop("reasoning_content")  # the name that vLLM reads
    if "content" in said:
        said["content"] = _text(f"{where}.content", said["content"])
    elif role != "assistant":
        raise ChatError(400, f"'{where}.content' is missing", code="missing_parameter", param=f"{where}.content")
    return said


def _text(where: str, content: Any) -> str:
    """Content as one string: a string, or text parts, which are joined by line breaks."""
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ChatError(
                    400,
                    f"'{where}[{index}]' is not a text part; this model reads text only",
                    code="unsupported_content",
                    param=f"{where}[{index}]",
                )
            for name in part.keys() - {"type", "text"}:
                raise unknown(name, ("type", "text"), f"{where}[{index}]")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ChatError(400, f"'{where}' must be a string or a list of text parts", code="invalid_value", param=where)
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ChatError(400, f"'{where}' holds half of a surrogate pair", code="invalid_value", param=where) from None
    return content


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _integer(low: float = -math.inf, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _a(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _stop(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return (
        isinstance(strings, list)
        and len(strings) <= 4
        and all(isinstance(string, str) and string for string in strings)
    )


def _stream_options(value: Any) -> bool:
    return isinstance(value, dict) and set(value) <= {"include_usage"} and all(map(_a(bool), value.values()))


def _template_variables(value: Any) -> bool:
    plain = isinstance(value, dict) and all(isinstance(one, str | int | float | None) for one in value.values())
    return plain and not TOLD_BY_ALL & value.keys()


def _always(value: Any) -> bool:
    return True


def _calls(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(call, dict) for call in value)


_BOOLEAN, _STRING, _OBJECT, _LIST = _a(bool), _a(str), _a(dict), _a(list)
_TOKENS = _integer(1, 1 << 31)
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

_FIELDS: dict[str, _Field] = {
    "model": _Field("a string", _STRING),
    "messages": _Field("a list with at least one message", lambda value: isinstance(value, list) and bool(value)),
    "stream": _Field("true or false", _BOOLEAN, _one_of(False)),
    "stream_options": _Field("an object that holds include_usage", _stream_options),
    # How much, and how many.
    "max_tokens": _Field("an integer of at least 1", _TOKENS),
    "max_completion_tokens": _Field("an integer of at least 1", _TOKENS),
    "min_tokens": _Field("an integer of at least 0", _integer(0), _one_of(0)),
    "n": _Field("an integer from 1 to 128", _integer(1, 128), _one_of(1)),
    "stop": _Field("a string, or a list of at most 4 strings, none empty", _stop, _one_of([])),
    "ignore_eos": _Field("true or false", _BOOLEAN, _one_of(False)),
    # How the next token is chosen.
    "temperature": _Field("a number from 0 to 2", _number(0, 2)),
    "top_p": _Field("a number above 0 and at most 1", _number(math.ulp(0.0), 1)),
    "top_k": _Field("an integer; 0 or -1: all tokens", _integer(-1, 1 << 31)),
    "min_p": _Field("a number from 0 to 1", _number(0, 1), _one_of(0)),
    "seed": _Field("an integer of 64 bits", _integer(-(1 << 63), (1 << 63) - 1)),
    "frequency_penalty": _Field("a number from -2 to 2", _number(-2, 2), _one_of(0)),
    "presence_penalty": _Field("a number from -2 to 2", _number(-2, 2), _one_of(0)),
    "repetition_penalty": _Field("a number above 0", _number(math.ulp(0.0), math.inf), _one_of(1)),
    "logit_bias": _Field("an object", _OBJECT, _one_of({})),
    # What is told about the answer.
    "logprobs": _Field("true or false", _BOOLEAN, _one_of(False)),
    "top_logprobs": _Field("an integer from 0 to 20", _integer(0, 20), _one_of(0)),
    # The form of the answer.
    "response_format": _Field("an object", _OBJECT, _one_of({"type": "text"})),
    "modalities": _Field("a list", _LIST, _one_of(["text"])),
    "audio": _Field("an object", _OBJECT),
    "prediction": _Field("an object", _OBJECT),
    "reasoning_effort": _Field(f"one of {', '.join(_EFFORTS)}", _one_of(*_EFFORTS), _one_of("none")),
    "chat_template_kwargs": _Field("an object of texts, numbers, true or false", _template_variables, _one_of({})),
    "verbosity": _Field("a string", _STRING, _one_of("medium")),
    # Tools. Without any, how to call them changes nothing.
    "tools": _Field("a list", _LIST, _one_of([])),
    "tool_choice": _Field("a string or an object", _a(str, dict), _one_of("none", "auto")),
    "parallel_tool_calls": _Field("true or false", _BOOLEAN, _always),
    "functions": _Field("a list", _LIST, _one_of([])),
    "function_call": _Field("a string or an object", _a(str, dict), _one_of("none", "auto")),
    "web_search_options": _Field("an object", _OBJECT),
    # Notes to the provider, which change no answer.
    "user": _Field("a string", _STRING, _always),
    "safety_identifier": _Field("a string", _STRING, _always),
    "metadata": _Field("an object", _OBJECT, _always),
    "prompt_cache_key": _Field("a string", _STRING, _always),
    "prompt_cache_retention": _Field("a string", _STRING, _always),
    "service_tier": _Field("a string", _STRING, _one_of("auto", "default")),
    "store": _Field("true or false", _BOOLEAN, _one_of(False)),
}

_MESSAGE_KEYS: dict[str, _Field] = {
    "role": _Field("a string", _STRING),
    "content": _Field("a string or a list of text parts", _always),
    "name": _Field("a string", _STRING),
    "reasoning": _Field("a string", _STRING, _one_of(""), ("assistant",)),
    "reasoning_content": _Field("a string", _STRING, _one_of(""), ("assistant",)),
    "tool_calls": _Field("a list of objects", _calls, _one_of([]), ("assistant",)),
    "tool_call_id": _Field("a string", _STRING, roles=("tool",)),
    # What an answer that is sent back may bring along.
    "refusal": _Field("null", _a(), _one_of("")),
    "annotations": _Field("an empty list", _a(), _one_of([])),
    "audio": _Field("null", _a()),
    "function_call": _Field("null", _a()),
}
